"""Reading program text, on a small text with the traps of real ones."""

import pytest

from olmax.planning import program

# ruff: noqa: E501
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/x/src/olmax/models/mlp.py"
2 "/x/src/olmax/training/step.py"

FunctionNames
1 "MLP.__call__"
2 "step"

FileLocations
1 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %mul = bf16[8,128]{1,0:T(8,128)(2,1)} multiply(%p, %p)
}

%body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %t = (s32[]{:T(128)}, /*index=1*/bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %kernel = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0}) custom-call(%x, %x), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp()/pallas_call"}, frontend_attributes={kernel_metadata={
"note":"{\\"block\\": 512}
}"
}}, backend_config={"body":"TUzv"}
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/jvp()/mul" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"500"}}
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%i, %y)
}

%condition (t: (s32[], bf16[8,128])) -> pred[] {
  %t = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %bound = s32[]{:T(128)} constant(32)
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %a)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  %known = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %gather = bf16[8,128]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%fused, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %result = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="module")
def read():
    return program.parse(TEXT)


def test_computations_and_entry(read):
    assert set(read.computations) == {"fused", "body", "condition", "main"}
    assert read.entry == "main"
    assert [i.name for i in read.computations["body"].instructions] == [
        "t", "i", "x", "kernel", "y", "out",
    ]  # fmt: skip


def test_kernel_metadata_with_line_breaks_and_braces_stays_in_one_instruction(read):
    kernel = read.computations["body"].by_name["kernel"]
    assert kernel.opcode == "custom-call"
    assert kernel.attribute("custom_call_target") == "tpu_custom_call"
    assert kernel.operands == ("x", "x")
    assert '"body":"TUzv"' in kernel.text


def test_trip_counts_from_the_condition_and_from_the_compiler(read):
    entry = read.computations["main"]
    assert read.trip_count(entry.by_name["loop"]) == 32
    assert read.trip_count(entry.by_name["known"]) == 7


def test_estimates(read):
    assert read.computations["body"].by_name["y"].cycles == 500
    assert read.computations["main"].by_name["gather"].cycles is None
    assert read.computations["main"].by_name["start"].cycles is None


def test_sources_are_read_through_the_frame_tables(read):
    assert read.source(read.computations["body"].by_name["y"]) == (
        ("/x/src/olmax/models/mlp.py", "MLP.__call__"),
        ("/x/src/olmax/training/step.py", "step"),
    )
    assert read.source(read.computations["main"].by_name["loop"]) == ()


def test_roots_and_called_computations(read):
    assert read.computations["body"].root.name == "out"
    assert read.computations["main"].by_name["loop"].called == {
        "condition": ("condition",),
        "body": ("body",),
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("(f32[2,3]{1,0}, s32[]{:T(128)}, pred[5])", 33),
        ("s4[8]", 4),
        ("f8e4m3fn[16]", 16),
        ("token[]", 0),
    ],
)
def test_array_bytes(text, expected):
    assert program.array_bytes(text) == expected


def test_a_loop_without_a_readable_bound_is_an_error():
    read = program.parse(
        TEXT.replace("%bound = s32[]{:T(128)} constant(32)", "%bound = s32[]{:T(128)} parameter(1)")
    )
    with pytest.raises(ValueError, match="trip count"):
        read.trip_count(read.computations["main"].by_name["loop"])


def test_a_text_without_entry_is_an_error():
    with pytest.raises(ValueError, match="entry"):
        program.parse("HloModule nothing\n")
