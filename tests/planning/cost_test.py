"""Adding up a real program: OLMo 2 7B compiled for v5p:4x4x4 (libtpu 0.0.52), 64 sequences of 4,096
tokens, fsdp=64, full rematerialisation. The text has lost the kernels' bodies and some of the
compiler's settings, nothing that is read here.
"""

import gzip
import pathlib
import re

import pytest

from olmax.models.presets import get_preset
from olmax.planning import chips, cost, kernels, memory, plan, program
from tests.planning.fake_mesh import mesh_of

GOLDEN = pathlib.Path(__file__).parent / "golden" / "olmo2_7b_v5p_4x4x4.txt.gz"
V5P = chips.CHIPS["v5p"]


@pytest.fixture(scope="module")
def text():
    return gzip.decompress(GOLDEN.read_bytes()).decode()


@pytest.fixture(scope="module")
def items(text):
    return cost.costs(text, mesh_of({"fsdp": 64}, (4, 4, 4)), V5P)


def test_cycles_are_those_of_all_estimates_times_their_loops(text, items):
    # Counted again by regular expressions alone; no loop stands inside another one here.
    block = r"^(?:ENTRY )?%(\S+) \([^\n]*\{\n(.*?)\n\}(?:, execution_thread=\"\w+\")?$"
    blocks = dict(re.findall(block, text, re.MULTILINE | re.DOTALL))
    entry = re.search(r"^ENTRY %(\S+) ", text, re.MULTILINE)[1]
    times = {entry: 1}
    for condition, body in re.findall(r"condition=%(\S+?), body=%(\S+?)[,\n]", blocks[entry]):
        times[body] = int(re.search(r"s32\[\]\S* constant\((\d+)\)", blocks[condition])[1])
    assert sorted(times.values()) == [1, 4, 4, 32, 32]
    total = 0
    for name, n in times.items():
        estimates = re.findall(r'"estimated_cycles":"(\d+)"', blocks[name])
        total += n * sum(int(e) for e in estimates if int(e) < 2**63 - 1)
    assert sum(c.times * c.cycles for c in items) == total


def test_the_layers_run_once_a_layer_and_the_loss_once_a_chunk(items):
    assert {c.times for c in items if c.part == "MLP" and c.phase != "update"} == {32}
    assert {c.times for c in items if c.source == "kernel"} == {32}
    assert 4 in {c.times for c in items if c.part == "head and loss"}


def test_every_pass_of_attention_calls_its_kernels(items):
    calls = sorted((c.name.split(".")[0], c.phase) for c in items if c.source == "kernel")
    assert calls == [
        ("splash_mha_dkv_no_residuals", "backward"),
        ("splash_mha_dq_no_residuals", "backward"),
        ("splash_mha_fwd_residuals", "forward"),
        ("splash_mha_fwd_residuals", "recomputed"),
    ]


def test_collectives_carry_every_weight_and_every_gradient(items):
    totals = {t.kind: t for t in plan.collective_totals(items)}
    assert set(totals) == {"all-gather", "all-reduce"}
    assert all(t.axes == ("fsdp",) for t in totals.values())
    config = get_preset("olmo2-7b")
    layers = config.num_params - 2 * config.vocab_size * config.d_model
    # bfloat16 weights for the forward pass and again for the backward pass (MLP and attention
    # inputs in two layouts there), the head and the embedding.
    gathered = totals["all-gather"].bytes / (2 * layers)
    assert 2 < gathered < 3.3
    assert totals["all-reduce"].bytes > 2 * layers


def test_computation_is_mostly_matrix_products_near_the_peak(items):
    parts = plan.part_totals(items, get_preset("olmo2-7b"), 4096, V5P.peak_flops)
    shares = {(p.part, p.phase): p.flops_share for p in parts}
    assert 0.7 < shares["MLP", "forward"] < 1
    assert 0.5 < shares["attention projections", "forward"] < 1
    assert shares["head and loss", "forward"] > 0.5
    # Nothing can be above the peak: that would be a wrong clock or a missed loop.
    assert all(share is None or share < 1 for share in shares.values())
    assert sum(p.seconds for p in parts if p.part == "other") < 0.02 * cost.total_seconds(items)


def test_step_time_is_computation_plus_what_it_waits_for(items):
    computing = sum(c.times * c.seconds for c in items)
    assert cost.total_seconds(items) == pytest.approx(computing + cost.exposed_seconds(items))
    assert 0.8 < cost.total_seconds(items) < 1.1


def test_saved_activations_are_one_layer_input_each(text):
    assert memory.saved_activations(text, 32) == 32 * 1 * 4096 * 4096 * 2


def test_kernel_times_grow_with_the_causal_triangle():
    def forward(batch, length):
        shape = f"bf16[{batch},16,{length},128]"
        line = f"  ROOT %splash_mha_fwd_residuals.1 = ({shape}, f32[1]) custom-call()"
        text = f"ENTRY %main () -> x {{\n{line}\n}}\n"
        call = program.parse(text).computations["main"].root
        return kernels.seconds(call, 0, V5P)

    # Published: 1.24 ms at 4 x 4,096 and 3.20 ms at 1 x 16,384, layout changes included.
    assert forward(4, 4096) == pytest.approx(0.8e-3, rel=0.1)
    assert forward(1, 16384) == pytest.approx(2.8e-3, rel=0.1)


def test_an_unknown_kernel_is_named(text):
    with pytest.raises(cost.UnknownKernel, match="mystery"):
        cost.costs(text.replace("splash_mha_fwd", "mystery"), mesh_of({"fsdp": 64}, (4, 4, 4)), V5P)


def link(computing: float, waiting: float, overlapped: bool, body: str = "b") -> cost.Cost:
    from olmax.planning.collectives import Collective

    return cost.Cost(
        name="x",
        part="MLP",
        phase="forward",
        times=2,
        cycles=0,
        seconds=computing,
        source="compiler",
        collective=Collective("all-gather", ("fsdp",), 4, 1, waiting) if waiting else None,
        overlapped=overlapped,
        body=body,
    )


def test_overlapped_collectives_cost_only_what_computation_does_not_cover():
    assert cost.exposed_seconds([link(1.0, 0, False), link(0, 0.5, True)]) == 0
    assert cost.exposed_seconds([link(1.0, 0, False), link(0, 1.5, True)]) == pytest.approx(1.0)
    assert cost.exposed_seconds([link(1.0, 0, False), link(0, 0.5, False)]) == pytest.approx(1.0)
    # Computation of another loop body covers nothing.
    apart = [link(1.0, 0, False, "other"), link(0, 0.5, True)]
    assert cost.exposed_seconds(apart) == pytest.approx(1.0)


GATHER = (
    "%gathered = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=9, dimensions={0}, "
    "replica_groups={{0,1,2,3}}, use_global_device_ids=true, "
    'backend_config={"async_collective_fusion_config":{"flag_start":"1"}}'
)
CHAIN = f"""%start (x: bf16[64,128]) -> (bf16[64,128], bf16[256,128]) {{
  %x = bf16[64,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  {GATHER}
  ROOT %s = (bf16[64,128], bf16[256,128]) custom-call(%gathered), \
custom_call_target="AsyncCollectiveStart"
}}

%beside (x: bf16[64,128], w: bf16[128,128]) -> (bf16[64,128], bf16[256,128]) {{
  %x = bf16[64,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %w = bf16[128,128]{{1,0:T(8,128)(2,1)}} parameter(1)
  {GATHER}
  %product = bf16[64,128]{{1,0:T(8,128)(2,1)}} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %t = (bf16[64,128], bf16[256,128]) tuple(%product, %gathered)
}}

%done (x: bf16[64,128]) -> bf16[256,128] {{
  %x = bf16[64,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  {GATHER}
  ROOT %d = bf16[256,128] custom-call(%gathered), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (x: bf16[64,128], w: bf16[128,128]) -> bf16[256,128] {{
  %x = bf16[64,128]{{1,0:T(8,128)(2,1)}} parameter(0)
  %w = bf16[128,128]{{1,0:T(8,128)(2,1)}} parameter(1)
  %a = (bf16[64,128], bf16[256,128]) fusion(%x), kind=kCustom, calls=%start
  %b = (bf16[64,128], bf16[256,128]) fusion(%x, %w), kind=kOutput, calls=%beside, \
backend_config={{"window_config":{{"estimated_cycles":"5000"}}}}
  ROOT %c = bf16[256,128] fusion(%x), kind=kCustom, calls=%done
}}
"""


def test_a_gather_that_fusions_carry_on_counts_once_and_beside_them():
    mesh = mesh_of({"fsdp": 4}, (2, 2, 1))
    items = cost.costs(CHAIN, mesh, chips.CHIPS["v5e"])
    (gather,) = [item for item in items if item.collective]
    assert gather.name == "a" and gather.overlapped
    assert gather.collective.bytes == 256 * 128 * 2
    assert [(item.name, item.cycles) for item in items if item.cycles] == [("b", 5000)]
    assert cost.exposed_seconds(items) == pytest.approx(
        max(0, gather.collective.seconds - 5000 / 1.5e9)
    )


def test_products_of_experts_are_priced_by_their_shapes():
    """Rows [4096, 128] with 16 matrices [128, 256], and the gradient of the matrices."""
    layout = "operand_layout_constraints={s32[1]{0}, s32[17]{0}, bf16[4096,128]{1,0}, "

    def seconds(name, result, last, operand_bytes=0):
        text = f'custom_call_target="tpu_custom_call", {layout}{last}}}, metadata={{}}'
        call = program.Instruction(name, result, "custom-call", (), text)
        return kernels.seconds(call, operand_bytes, V5P)

    forward = seconds("ragged-dot-none.6", "f32[4096,256]{1,0}", "bf16[16,128,256]{2,1,0}")
    gradient = seconds("ragged-dot-none.9", "f32[16,128,256]{2,1,0}", "bf16[4096,256]{1,0}")
    assert forward == gradient == pytest.approx(2 * 4096 * 128 * 256 / 98e12, rel=0.01)
    # Few rows: the way of the matrices through HBM decides.
    slow = seconds("ragged-dot-none.6", "f32[4096,256]{1,0}", "bf16[16,128,256]{2,1,0}", 10**9)
    assert slow == pytest.approx((10**9 + 4 * 4096 * 256) / V5P.hbm_bandwidth)
    metadata = seconds("ragged-dot-metadata.2", "(s32[17]{0}, s32[47]{0})", "s32[47]{0}", 64)
    assert metadata == pytest.approx((64 + 4 * 64) / V5P.hbm_bandwidth)
