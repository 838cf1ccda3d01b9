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


def test_the_largest_are_products_and_kernels_as_the_compiler_meets_them():
    text = """HloModule jit_step, is_scheduled=true

%inner (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  ROOT %convolution.1 = bf16[8,8]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%outer (b: bf16[8,8]) -> bf16[8,8] {
  %b = bf16[8,8]{1,0} parameter(0)
  ROOT %nested = bf16[8,8]{1,0} fusion(%b), kind=kOutput, calls=%inner
}

%scaled (c: bf16[8,8]) -> bf16[8,8] {
  %c = bf16[8,8]{1,0} parameter(0)
  ROOT %multiply.1 = bf16[8,8]{1,0} multiply(%c, %c)
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %fusion.1 = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%outer
  %fusion.2 = bf16[8,8]{1,0} fusion(%fusion.1), kind=kLoop, calls=%scaled
  %kernel.3 = bf16[8,8]{1,0} custom-call(%fusion.2), custom_call_target="tpu_custom_call"
  ROOT %convolution.4 = bf16[8,8]{1,0} convolution(%kernel.3, %x), dim_labels=bf_io->bf
}
"""
    found = optimised.Optimised(text, 0)
    assert found.largest == {"fusion.1", "kernel.3", "convolution.4"}
