"""Programs the compiler dumps before machine code, and plans made of them."""

import importlib.util

import pytest

from olmax.errors import UserError
from olmax.planning import optimised
from olmax.planning.plan import plan
from olmax.planning.topology import Topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'olmax[tpu]')",
)


def test_nothing_is_read_before_the_last_file_is_there(tmp_path):
    (tmp_path / "module_0000.jit_step.after_optimizations.hlo.pb").write_bytes(b"half")
    assert optimised.read(tmp_path) is None


def test_a_field_is_found_behind_others_of_every_kind():
    varint, fixed64, fixed32 = b"\x10\xac\x02", b"\x19" + bytes(8), b"\x25" + bytes(4)
    skipped, wanted = b"\x2a\x03abc", b"\x0a\x02hi"
    message = varint + fixed64 + fixed32 + skipped + wanted
    assert optimised._field(message, 1) == b"hi"
    with pytest.raises(ValueError, match="no field 7"):
        optimised._field(message, 7)


def test_memory_is_that_of_the_device_without_threads_and_other_spaces():
    report = (
        "BufferAssignment:\n"
        "allocation 0: size 4096, page 0, thread-local:\n value: <1 add @0>\n"
        "allocation 1: size 100, page 0, parameter 8, shape |f32[25]| at ShapeIndex {}:\n"
        "allocation 2: size 7, color 1, page 0, preallocated-temp:\n"
        "allocation 3: size 1000, page 0, preallocated-temp:\n"
    )
    assert optimised._hbm_bytes(report) == 1100
    with pytest.raises(ValueError, match="no allocation"):
        optimised._hbm_bytes("")


@needs_libtpu
def test_a_quick_plan_has_the_compilers_memory_and_collectives():
    request = dict(batch_size=8, sequence_length=512, mesh="fsdp=4")
    topology = Topology.parse("v5e:2x2")
    quick = plan("olmo2-tiny", topology, **request, quick=True)
    whole = plan("olmo2-tiny", topology, **request)
    assert quick.quick and not whole.quick
    assert quick.plan_seconds < whole.plan_seconds
    for name in ("parameters", "optimizer", "activations"):
        assert getattr(quick.per_device_bytes, name) == getattr(whole.per_device_bytes, name)
    # Machine code is counted with what it takes at most.
    assert 0 <= quick.per_device_bytes.total - whole.per_device_bytes.total <= 2**27
    assert quick.collectives == whole.collectives
    # Products so narrow leave most of a matrix unit empty, which the estimate does not know.
    assert quick.step_seconds == pytest.approx(whole.step_seconds, rel=0.5)


@needs_libtpu
def test_bad_input_is_told_as_by_a_whole_plan():
    with pytest.raises(UserError, match="batch size 3 does not divide"):
        plan(
            "olmo2-tiny",
            Topology.parse("v5e:2x2"),
            batch_size=3,
            sequence_length=128,
            mesh="fsdp=4",
            quick=True,
        )
