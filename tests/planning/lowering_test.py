"""Reading the compiler's log: which operations are done, and their estimated cycles."""

import pytest

from olmax.planning import lowering

# As libtpu writes it; the thread's number stands in front of the file. It is no thread of ours.
START = "I1128 15:25:56.{:06} {} lowering_emitter.cc:7931] Started lowering {}\n"
CHOOSING = (
    "I1128 15:25:56.{:06} {} spatial_major_convolution.cc:5104] "
    "SpatialMajorConvolution::ComputeWindowConfigInternal called for {}\n"
)
CHOSEN = (
    "I1128 15:25:56.{:06} {} spatial_major_convolution.cc:5468] "
    "SpatialMajorConvolution::ComputeWindowConfigInternal returning config: "
    "output_bounds=[128, 8] kernel_bounds=[256, 8] cycles={}\n"
)
MADE = (
    "I1128 15:25:57.{:06} {} lowering_emitter.cc:7591] Final Successful Config for {} | retry_opt: "
    "false | retry_count: 0 | config: go/debugstr  output_window_bounds: 8 estimated_cycles: {} "
    "iteration_bounds: 1\n"
)
NO_WINDOW = (
    "I1128 15:25:57.{:06} {} lowering_emitter.cc:7597] Final Successful Config for {} | retry_opt: "
    "false | retry_count: 0 | config: none or no window\n"
)
FAILED = (
    "I1128 15:25:57.{:06} {} lowering_emitter.cc:7273] Compilation result status for {} is: "
    "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\n"
)
SAME = (
    "I1128 15:25:56.{:06} {} hlo_deduplication.cc:446] Found duplicate of %{} = fusion(%a, %b): "
    "%{} = fusion(%c, %d)\n"
)


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The threads that stepped back."""
    found: list[int] = []
    monkeypatch.setattr(lowering, "_step_back", found.append)
    return found


def test_a_product_is_done_when_its_tiles_are_chosen_and_others_when_they_are_made(threads):
    log = lowering.Log()
    log.read(START.format(1, 11, "fusion.1") + START.format(2, 12, "add.2"))
    log.read(CHOOSING.format(3, 11, "fusion.1"))
    assert not log.complete(["fusion.1"]) and not log.cycles
    log.read(CHOSEN.format(4, 11, 1127272))
    assert log.cycles == {"fusion.1": 1127272} and threads == [11]
    assert not log.complete(["fusion.1"])
    log.read(MADE.format(5, 12, "add.2", 2209))
    assert log.cycles["add.2"] == 2209
    assert log.complete(["fusion.1"]) and not log.complete(["fusion.1", "kernel.3"])


def test_threads_that_choose_at_once_are_told_apart():
    log = lowering.Log()
    log.read(CHOOSING.format(1, 11, "a") + CHOOSING.format(2, 12, "b"))
    log.read(CHOSEN.format(3, 12, 2) + CHOSEN.format(4, 11, 1))
    assert log.cycles == {"a": 1, "b": 2}


def test_lines_come_in_pieces_and_among_others():
    log = lowering.Log()
    text = "WARNING: something\n" + START.format(1, 11, "a") + NO_WINDOW.format(2, 11, "a")
    for character in text:
        log.read(character)
    assert log.complete(["a"]) and not log.cycles


def test_an_operation_that_fails_is_not_done_before_another_attempt_succeeds():
    log = lowering.Log()
    log.read(START.format(1, 11, "a") + FAILED.format(2, 11, "a"))
    assert not log.complete([])
    log.read(MADE.format(3, 11, "a", 7))
    assert log.complete(["a"])


def test_a_duplicate_has_the_cycles_of_the_first():
    log = lowering.Log()
    log.read(SAME.format(1, 11, "fusion.2", "fusion.1") + MADE.format(2, 11, "fusion.1", 7))
    assert log.complete(["fusion.2"])
    text = log.annotated('  %fusion.2 = f32[8]{0} fusion(%c), kind=kLoop, backend_config={"a":1}')
    assert '"estimated_cycles":"7"' in text and text.endswith(',"a":1}')


def test_a_program_is_annotated_where_the_compiler_writes_cycles():
    log = lowering.Log()
    log.read(MADE.format(1, 11, "copy.1", 5))
    lines = [
        "ENTRY %main {",
        "  ROOT %copy.1 = f32[8]{0} copy(%x)",
        "  %copy.12 = f32[8]{0} copy(%x)",
    ]
    first, second, third = log.annotated("\n".join(lines)).split("\n")
    assert (first, third) == (lines[0], lines[2])
    assert second == lines[1] + ', backend_config={"window_config":{"estimated_cycles":"5"}}'


def test_the_log_is_told_from_what_else_a_process_writes():
    text = START.format(1, 11, "a") + "Traceback\n" + CHOSEN.format(1, 11, 3) + "ValueError: x"
    assert lowering.without_log(text) == "Traceback\nValueError: x"


def test_flags_of_the_user_are_kept():
    made = lowering.environment({"LIBTPU_INIT_ARGS": "--xla_tpu_detect_nan=true"})
    assert made["LIBTPU_INIT_ARGS"].startswith("--xla_tpu_detect_nan=true --vmodule=")
