"""Device groups as the compiler writes them, and the time of collectives on known rings."""

import numpy as np
import pytest

from olmax.planning import chips, collectives, program
from tests.planning.fake_mesh import mesh_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", [0, 2]),
        ("[2,4]<=[8]", [0, 1, 2, 3]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("mesh['axis_0'=8] {'axis_0'}", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("mesh['data'=2,'fsdp'=4] {'fsdp'}", [0, 1, 2, 3]),
        ("mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
        ("mesh['a'=2,'b'=4], device_ids=([0,2,4,6,1,3,5,7]) {'b'}", [0, 2, 4, 6]),
        ("mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("", [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_first_group(text, expected):
    assert collectives.first_group(text, 8).tolist() == expected


def test_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="device groups"):
        collectives.first_group("?", 8)


V5P, V6E = chips.CHIPS["v5p"], chips.CHIPS["v6e"]


@pytest.mark.parametrize("there", [True, False])
def test_rows_that_go_to_experts_are_those_a_device_holds_not_the_buffer(there):
    held, buffer = "bf16[1024,256]{1,0}", "bf16[8192,256]{1,0}"
    source, target = (held, buffer) if there else (buffer, held)
    places = ", ".join(f"s32[8]{{0}} %p{i}" for i in range(4))
    line = (
        f"  %r = {target} ragged-all-to-all({source} %x, {target} %o, {places}), "
        "replica_groups={{0,1,2,3,4,5,6,7}}"
    )
    text = f"ENTRY %main () -> {target} {{\n{line}\n}}\n"
    (instruction,) = program.parse(text).computations["main"].instructions
    operands = sum(program.array_bytes(part) for part in (source, target)) + 4 * 32
    mesh = mesh_of({"expert": 8}, (2, 2, 2))
    found = collectives.read(instruction, operands, mesh, V5P)
    assert found is not None and found.kind == "all-to-all" and found.axes == ("expert",)
    assert found.bytes == pytest.approx(1024 * 256 * 2, abs=200)


def test_a_start_does_not_count_the_operands_that_its_result_repeats():
    rows = "bf16[1024,256]{1,0:T(8,128)(2,1)}"
    buffer = "bf16[8192,256]{1,0:T(8,128)(2,1)}"
    line = (
        f"  %r = (({rows}, {buffer}, s32[8]{{0}}), {buffer}, u32[]) "
        f"ragged-all-to-all-start({rows} %x, {buffer} %o, s32[8]{{0}} %p), "
        "replica_groups={{0,1,2,3,4,5,6,7}}"
    )
    text = f"ENTRY %main () -> {buffer} {{\n{line}\n}}\n"
    (instruction,) = program.parse(text).computations["main"].instructions
    operands = 2 * 256 * (1024 + 8192) + 32
    found = collectives.read(instruction, operands, mesh_of({"expert": 8}, (2, 2, 2)), V5P)
    assert found is not None
    assert found.bytes == pytest.approx(1024 * 256 * 2, abs=200)


def test_all_gather_over_a_whole_torus_uses_every_link():
    mesh = mesh_of({"fsdp": 64}, (4, 4, 4))
    size = 64 * 10**6
    seconds = collectives.link_seconds("all-gather", size, np.arange(64), mesh, V5P)
    # Six links of 90 GB/s; every device receives all but its own part.
    assert seconds == pytest.approx(size * 63 / 64 / (6 * 90e9))


def test_all_reduce_sends_twice_what_all_gather_does():
    mesh = mesh_of({"fsdp": 64}, (4, 4, 4))
    gather, reduce = (
        collectives.link_seconds(kind, 10**8, np.arange(64), mesh, V5P)
        for kind in ("all-gather", "all-reduce")
    )
    assert reduce == pytest.approx(2 * gather)


def test_a_line_that_is_no_ring_has_one_direction():
    open_line = mesh_of({"fsdp": 4, "tensor": 4}, (4, 4))
    ring = mesh_of({"fsdp": 16, "tensor": 16}, (16, 16))
    line = collectives.link_seconds("all-gather", 10**8, np.arange(4), open_line, V6E)
    closed = collectives.link_seconds("all-gather", 10**8, np.arange(16), ring, V6E)
    assert line == pytest.approx(10**8 * 3 / 4 / 90e9)
    assert closed == pytest.approx(10**8 * 15 / 16 / 180e9)


def test_between_slices_the_hosts_network_carries_each_chips_piece():
    mesh = mesh_of({"slice": 2, "fsdp": 64}, (4, 4, 4), slices=2)
    across = collectives.link_seconds("all-reduce", 10**8, np.array([0, 64]), mesh, V5P)
    assert across == pytest.approx(2 * 10**8 / 2 / V5P.dcn_bandwidth)


def test_one_device_needs_no_link():
    mesh = mesh_of({"fsdp": 4}, (2, 2))
    assert collectives.link_seconds("all-reduce", 10**8, np.array([0]), mesh, V6E) == 0
