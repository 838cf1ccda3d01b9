"""The quick plan and then the whole one, in a process of their own."""

import contextlib
import importlib.util

import pytest

from olmax.cli import plan as verb
from olmax.errors import UserError
from olmax.planning import staged
from olmax.planning.plan import plan
from olmax.planning.topology import Topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'olmax[tpu]')",
)


def request(**settings):
    return (
        dict(
            model="olmo2-tiny",
            topology=Topology.parse("v5e:2x2"),
            batch_size=8,
            sequence_length=512,
            mesh="fsdp=4",
            remat="full",
            accumulation=1,
            tokens=1e12,
            price_per_chip_hour=None,
            keep_program=None,
        )
        | settings
    )


@needs_libtpu
def test_the_quick_plan_has_the_compilers_memory_and_collectives():
    with contextlib.closing(staged.stages(request())) as stages:
        quick, whole = stages
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
def test_bad_input_is_told_as_by_a_plan_in_this_process():
    settings = dict(batch_size=3, sequence_length=128, mesh="fsdp=4")
    for quick in (False, True):
        with pytest.raises(UserError, match="batch size 3 does not divide"):
            plan("olmo2-tiny", Topology.parse("v5e:2x2"), **settings, quick=quick)


def test_a_process_that_dies_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)planning failed:.*unexpected keyword"):
        next(staged.stages(request(colour="blue")))


def plans(*stages):
    for stage in stages:
        if isinstance(stage, BaseException):
            raise stage
        yield stage


@pytest.fixture(autouse=True)
def no_tables(monkeypatch):
    monkeypatch.setattr("olmax.planning.view.summary_text", lambda plan: f"plan {plan['name']}")


QUICK, WHOLE = dict(quick=True, name="first"), dict(quick=False, name="second")


def test_the_command_waits_for_the_whole_plan_and_shows_the_quick_one_meanwhile(capsys):
    assert verb._last(plans(QUICK, WHOLE), quick=False) == (WHOLE, False)
    shown = capsys.readouterr()
    assert "plan first" in shown.err and not shown.out


def test_the_command_is_content_with_the_quick_plan():
    assert verb._last(plans(QUICK, AssertionError()), quick=True) == (QUICK, False)


def test_what_the_compiler_refuses_is_final():
    refused = dict(quick=False, name="refused")
    assert verb._last(plans(refused, AssertionError()), quick=False) == (refused, False)


def test_an_interrupted_command_keeps_the_quick_plan():
    assert verb._last(plans(QUICK, KeyboardInterrupt()), quick=False) == (QUICK, True)
    with pytest.raises(KeyboardInterrupt):
        verb._last(plans(KeyboardInterrupt()), quick=False)
