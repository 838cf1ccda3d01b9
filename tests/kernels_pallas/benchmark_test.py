"""The table of the kernels' benchmarks."""

from kernels_pallas import benchmark
from kernels_pallas.benchmark import Row
from kernels_pallas.grouped_matmul import benchmark as grouped_matmul


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


def test_the_first_run_is_not_timed():
    calls = []
    seconds = benchmark.best_seconds(lambda *call: calls.append(call) or 0, 1, 2, repeats=3)
    assert calls == [(1, 2)] * 4 and seconds >= 0


def test_the_speed_of_a_weight_gradient_is_measured_on_any_device(monkeypatch):
    for name, size in dict(ROWS=64, GROUPS=2, WIDTH=16, HIDDEN=8).items():
        monkeypatch.setattr(grouped_matmul, name, size)
    assert grouped_matmul._gradient_speed("tiled") > 0
