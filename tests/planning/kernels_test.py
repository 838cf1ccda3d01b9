"""Kernels that declare their work are timed by it; a kernel that declares nothing has no time."""

import pytest

from olmax.planning import kernels, program
from olmax.planning.chips import find

TEXT = """HloModule m

ENTRY %main (x: f32[512,256]) -> f32[512,256] {{
  %x = f32[512,256]{{1,0}} parameter(0)
  ROOT %{name}.1 = f32[512,256]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={{"custom_call_config":{{"body":"BODY"{estimate}}}}}
}}
"""
DECLARED = (
    ',"cost_estimate":{"flops":"%d","transcendentals":"5","bytes_accessed":"%d",'
    '"remote_bytes_transferred":"0"}'
)


def call(name: str, estimate: str) -> program.Instruction:
    read = program.parse(TEXT.format(name=name, estimate=estimate))
    return read.computations["main"].root


def test_declared_work_over_what_is_attainable():
    chip = find("v5p")
    busy = call("grouped_matmul", DECLARED % (10**12, 1000))
    for name, share in (("v5p", 0.9), ("v6e", 0.8)):
        seconds = kernels.seconds(busy, 0, find(name))
        assert seconds == pytest.approx(1e12 / (share * find(name).peak_flops))
    waiting = call("linear_cross_entropy_forward", DECLARED % (1000, 10**10))
    assert kernels.seconds(waiting, 0, chip) == pytest.approx(1e10 / chip.hbm_bandwidth)


def test_attention_is_timed_by_the_tiles_that_it_visits():
    chip = find("v6e")
    tile = 4 * 512 * 512 * 128
    results = 512 * 256 * 4 / chip.hbm_bandwidth
    forward = call("jvp_attention_forward_", DECLARED % (3 * tile, 1))
    expected = 3 * chip.splash.tile_seconds + results
    assert kernels.seconds(forward, 0, chip) == pytest.approx(expected)
    # Five products instead of two, and the ratio of the measured times instead of 5 / 2.
    backward = call("attention_backward", DECLARED % (3 * tile * 5 // 2, 1))
    expected = 3 * chip.splash.tile_seconds * chip.splash.backward + results
    assert kernels.seconds(backward, 0, chip) == pytest.approx(expected)
    assert kernels.seconds(call("attention_forward", ""), 0, chip) is None


def test_parts_of_the_model():
    declared = DECLARED % (1, 1)
    loss = call("transpose_jvp_linear_cross_entropy_backward__", declared)
    assert kernels.find(loss).part == "head and loss"
    assert kernels.find(call("combine", declared)).part == "router"
    assert kernels.find(call("grouped_outer", declared)).part == "experts"
    assert kernels.find(call("linear_cross_entropy_backward", declared)).part == "head and loss"
    assert kernels.find(call("attention_backward", declared)).part == "attention kernel"
    assert kernels.find(call("something_new", declared)).part == "other"


def test_a_kernel_that_declares_nothing():
    assert kernels.seconds(call("something_new", ""), 0, find("v5p")) is None
