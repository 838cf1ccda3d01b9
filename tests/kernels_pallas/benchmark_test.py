"""The table of the kernels' benchmarks."""

from kernels_pallas import benchmark
from kernels_pallas.benchmark import Row


def test_an_op_replaces_its_own_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "TABLE", tmp_path / "BENCHMARK.md")
    benchmark.write("router", ["| router | old |"])
    benchmark.write("attention", ["| attention | first |"])
    benchmark.write("router", ["| router | new |"])
    text = benchmark.TABLE.read_text()
    assert text.index("## attention") < text.index("## router")
    assert "| attention | first |" in text and "| router | new |" in text
    assert "old" not in text and text.count("jaxlib") == 2


def test_rows_show_ratios_and_what_could_not_run():
    row = Row("attention", "forward", "v6e", "bundles", 624.0, 988.0, "splash", "0 spills")
    assert benchmark.line(row) == (
        "| attention | forward | v6e | bundles | 624 | 988 | 0.63 | splash | 0 spills |"
    )
    missing = Row("attention", "forward", "GPU", "time", None, note="never run")
    assert (
        benchmark.line(missing) == "| attention | forward | GPU | time | - | - | - |  | never run |"
    )


def test_every_op_with_a_benchmark_is_found():
    assert "attention" in benchmark.ops()
