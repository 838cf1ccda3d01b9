"""The quick plan and then the whole one, in a process of their own."""

import contextlib
import dataclasses
import importlib.util
import re

import pytest

from olmax.cli import plan as verb
from olmax.errors import UserError
from olmax.models.presets import get_preset
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
def test_cycles_that_are_known_before_machine_code_are_those_in_the_end(tmp_path):
    # As wide as it takes for products to be made long after all else is.
    model = dataclasses.replace(
        get_preset("olmo2-tiny"),
        n_layers=2,
        d_model=512,
        d_ff=2048,
        n_heads=4,
        n_kv_heads=4,
        head_dim=128,
    )
    program = tmp_path / "program.txt"
    wide = request(model=model, sequence_length=1024, machine_code=True, keep_program=str(program))
    plans, cycles = [], []
    with contextlib.closing(staged.stages(wide)) as stages:
        for plan in stages:
            plans.append(plan)
            cycles.append(re.findall(r'%(\S+) = .*"estimated_cycles":"(\d+)"', program.read_text()))
    _, whole, ended = plans
    assert [plan.quick for plan in plans] == [True, False, False]
    assert [plan.machine_code for plan in plans] == [False, False, True]
    assert whole.plan_seconds < ended.plan_seconds
    assert not cycles[0] and len(cycles[1]) > 50
    assert sorted(cycles[1]) == sorted(cycles[2])
    assert whole.cycles == ended.cycles
    assert whole.step_seconds == ended.step_seconds
    assert whole.collectives == ended.collectives


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


def stage(name, *, quick=False, machine_code=False, seconds: float | None = 1.0):
    return dict(name=name, quick=quick, machine_code=machine_code, step_seconds=seconds)


QUICK, WHOLE, CODE = stage("first", quick=True), stage("second"), stage("third", machine_code=True)


def test_the_command_waits_for_the_whole_plan_and_shows_the_quick_one_meanwhile(capsys):
    assert verb._last(plans(QUICK, WHOLE, AssertionError())) == (WHOLE, False)
    shown = capsys.readouterr()
    assert "plan first" in shown.err and not shown.out


def test_the_command_waits_for_machine_code_and_shows_the_others_meanwhile(capsys):
    assert verb._last(plans(QUICK, WHOLE, CODE), machine_code=True) == (CODE, False)
    shown = capsys.readouterr().err
    assert "plan first" in shown and "plan second" in shown
    assert verb._last(plans(QUICK, CODE), machine_code=True) == (CODE, False)


def test_the_command_is_content_with_the_quick_plan():
    assert verb._last(plans(QUICK, AssertionError()), quick=True) == (QUICK, False)


@pytest.mark.parametrize("machine_code", [False, True])
def test_what_the_compiler_refuses_is_final(machine_code):
    refused = stage("refused", seconds=None)
    assert verb._last(plans(refused, AssertionError()), machine_code=machine_code)[0] == refused
    later = plans(QUICK, refused, AssertionError())
    assert verb._last(later, machine_code=machine_code) == (refused, False)


def test_an_interrupted_command_keeps_the_best_plan():
    assert verb._last(plans(QUICK, KeyboardInterrupt())) == (QUICK, True)
    code = plans(QUICK, WHOLE, KeyboardInterrupt())
    assert verb._last(code, machine_code=True) == (WHOLE, True)
    with pytest.raises(KeyboardInterrupt):
        verb._last(plans(KeyboardInterrupt()))


def test_quick_and_machine_code_exclude_each_other():
    with pytest.raises(UserError, match="--quick stops before machine code"):
        verb.Plan(quick=True, machine_code=True).run()
