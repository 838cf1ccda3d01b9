"""How a plan looks: terminal tables, comparison, page; and the command's own checks."""

import dataclasses
import gzip
import importlib.util
import io
import json
import pathlib

import pytest
from rich.console import Console

from olmax.cli.plan import Plan as PlanVerb
from olmax.errors import UserError
from olmax.models.presets import get_preset
from olmax.planning import advice, chips, cost, memory, plan, stored, view
from olmax.planning.topology import Topology
from olmax.reporting.files import jsonable, write_json
from tests.planning.fake_mesh import mesh_of

GOLDEN = pathlib.Path(__file__).parent / "golden" / "olmo2_7b_v5p_4x4x4.txt.gz"
V5P = chips.CHIPS["v5p"]
GIB = 2**30


@pytest.fixture(scope="module")
def made():
    """The plan of the stored program."""
    text = gzip.decompress(GOLDEN.read_bytes()).decode()
    config = get_preset("olmo2-7b")
    items = cost.costs(text, mesh_of({"fsdp": 64}, (4, 4, 4)), V5P)
    seconds = cost.total_seconds(items)
    tokens = 64 * 4096
    state = config.num_params * 4 // 64
    saved = memory.saved_activations(text, config.n_layers)
    per_device = plan.DeviceBytes(state, 2 * state, saved, 4 * GIB, 3 * state + saved + 4 * GIB)
    topology = Topology.parse("v5p:4x4x4")
    verdict = advice.verdict(
        per_device.total,
        3 * state,
        fits=True,
        topology=topology,
        accumulation=1,
        batch_per_shard=1,
    )
    return jsonable(
        plan.Plan(
            model="olmo2-7b",
            parameters=config.num_params,
            topology=topology.name,
            slices=1,
            devices=64,
            chips=64,
            mesh={"fsdp": 64},
            mesh_reason="given",
            batch_size=64,
            sequence_length=4096,
            accumulation=1,
            remat="full",
            per_device_bytes=per_device,
            hbm_bytes=V5P.hbm_bytes,
            fits=True,
            verdict=verdict,
            step_seconds=seconds,
            compute_seconds=sum(c.times * c.seconds for c in items if c.source != "kernel"),
            kernel_seconds=sum(c.times * c.seconds for c in items if c.source == "kernel"),
            exposed_collective_seconds=cost.exposed_seconds(items),
            cycles=sum(c.times * c.cycles for c in items),
            mfu=config.matmul_flops_per_token(4096) * tokens / seconds / 64 / V5P.peak_flops,
            mfu_error=0.1,
            tokens_per_second_per_chip=tokens / seconds / 64,
            collectives=plan.collective_totals(items),
            parts=plan.part_totals(items, config, 4096, V5P.peak_flops),
            tokens=1e12,
            days=1e12 / tokens * seconds / 86400,
            price_per_chip_hour=4.2,
            price=1e6,
            compile_seconds=30.0,
            plan_seconds=35.0,
        )
    )


def printed(*tables) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table.rich())
    return console.file.getvalue()


def test_the_summary_answers_the_questions(made):
    text = view.summary_text(made)
    for word in ("7.30 B", "fsdp=64", "fits:", "1,372 Mcycles", "MFU", "days", "off by 10%"):
        assert word in text


def test_a_quick_plan_says_so(made):
    text = view.summary_text(dict(made, quick=True))
    assert "times from FLOPs and bytes" in text and "quick plans are off by 10%" in text
    assert "quick" not in view.summary_text(made)


def test_parts_add_up_to_the_step(made):
    shown = sum(row["seconds"] for row in made["parts"]) + made["exposed_collective_seconds"]
    assert shown == pytest.approx(made["step_seconds"], rel=1e-6)
    text = printed(view.part_table(made), view.collective_table(made))
    for word in ("embedding", "attention kernel", "MLP", "recomputed", "all-gather", "fsdp"):
        assert word in text


def test_comparison_sets_both_plans_side_by_side(made):
    other = json.loads(json.dumps(made))
    other["cycles"] = made["cycles"] * 2
    text = printed(*view.comparison(made, other, ("a.json", "b.json")))
    line = next(line for line in text.splitlines() if "Mcycles" in line)
    assert "1,372" in line and "2,744" in line and "2.00" in line


def test_the_page_holds_bars_and_no_script(made):
    html = view.report(made).html()
    assert "Plan: olmo2-7b" in html
    assert html.count("data:image/svg+xml;base64,") == 2
    assert "<script" not in html


def test_a_plan_that_does_not_fit_has_no_times(made):
    big = dict(made, fits=False, verdict="does not fit: over by 3.1 GiB", parts=[], collectives=[])
    for key in ("step_seconds", "mfu", "days", "price", "cycles", "compute_seconds"):
        big[key] = None
    assert "over by 3.1 GiB" in printed(view.summary(big))
    assert "over by 3.1 GiB" in view.report(big).html()
    assert view.comparison(made, big, ("a", "b"))


def test_plans_on_disk(made, tmp_path):
    path = tmp_path / "plan.json"
    write_json(path, made)
    assert stored.load(path) == made
    for text, message in (("{", "not a plan"), ("{}", "has no model"), ("[]", "has no model")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            stored.load(path)
    with pytest.raises(UserError, match="no such plan"):
        stored.load(tmp_path / "none.json")


def verb(**kwargs) -> PlanVerb:
    settings = dict(model="olmo2-tiny", topology="v5e:2x2", batch_size=4, sequence_length=128)
    return PlanVerb(**(settings | kwargs))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'olmax[tpu]')",
)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(model=None), "needs --model"),
        (dict(batch_size=None, topology=None), "needs --topology, --batch-size"),
        (dict(model="olmo2-8b"), "unknown model preset"),
        (dict(topology="v9:4x4"), "no figures for TPU"),
    ],
)
def test_bad_input_is_one_line(kwargs, message):
    with pytest.raises(UserError, match=message) as caught:
        verb(**kwargs).run()
    assert "\n" not in str(caught.value)


@needs_libtpu
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(mesh="fsdp=3"), "needs 3 devices, there are 4"),
        (dict(mesh="fsdp=4", batch_size=6), "batch size 6 does not divide over 4 batch shards"),
        (dict(mesh="model=4"), "unknown axis"),
        (dict(batch_size=7, topology="v5e:4x4"), "no mesh of 16 chips"),
        (dict(tokens=0.0), "tokens must be positive"),
        (dict(price_per_chip_hour=-1.0), "must be 0 or more"),
        (dict(batch_size=0), "at least 1"),
    ],
)
def test_input_that_does_not_fit_together(kwargs, message):
    with pytest.raises(UserError, match=message) as caught:
        verb(**kwargs).run()
    assert "\n" not in str(caught.value)


@needs_libtpu
def test_a_tiny_model_from_end_to_end(tmp_path):
    out, html = tmp_path / "plan.json", tmp_path / "plan.html"
    verb(mesh="fsdp=4", output=str(out), html=str(html), explain=True).run()
    found = stored.load(out)
    assert found["fits"]
    assert found["mesh"] == {"fsdp": 4}
    config = get_preset("olmo2-tiny")
    # float32 parameters and two moments, cut in four where fsdp divides them.
    assert found["per_device_bytes"]["parameters"] < config.num_params * 4 / 4 * 1.05
    optimizer = found["per_device_bytes"]["optimizer"]
    assert optimizer == pytest.approx(2 * found["per_device_bytes"]["parameters"], rel=0.01)
    assert 0 < found["mfu"] < 1
    assert html.read_text().count("data:image/svg+xml") == 2


def test_dataclass_fields_are_the_documented_ones():
    names = {field.name for field in dataclasses.fields(plan.Plan)}
    assert names >= {
        "parameters", "topology", "devices", "mesh", "per_device_bytes", "hbm_bytes", "fits",
        "step_seconds", "mfu", "collectives", "days", "price",
    }  # fmt: skip
