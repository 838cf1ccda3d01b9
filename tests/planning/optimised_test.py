"""Programs that the compiler dumps before machine code."""

import pytest

from olmax.planning import optimised


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
