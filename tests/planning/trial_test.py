"""Choosing a mesh by quick plans, which are made up here but for one."""

import dataclasses
import importlib.util

import pytest

from olmax.errors import UserError
from olmax.planning import proposal, staged, trial
from olmax.planning.compilation import MeshError
from olmax.planning.plan import plan
from olmax.planning.topology import Topology
from olmax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Bytes:
    total: int = 1


@dataclasses.dataclass(frozen=True)
class Planned:
    """What `trial` reads of a plan, and what it was asked."""

    mesh: str
    step_seconds: float | None
    quick: bool = True
    fits: bool = True
    mesh_reason: str = "given"
    plan_seconds: float = 0.0
    per_device_bytes: Bytes = dataclasses.field(default_factory=Bytes)
    keep_program: str | None = None


REQUEST = dict(
    model="olmo2-tiny",
    topology=Topology.parse("v5e:2x2"),
    batch_size=8,
    sequence_length=128,
    accumulation=1,
    mesh=None,
    keep_program=None,
)
MESHES = tuple(
    map(MeshConfig.parse, ("fsdp=4", "data=2,fsdp=2", "data=4,fsdp=1", "fsdp=1,tensor=4"))
)


@pytest.fixture
def asked(monkeypatch):
    """The requests that reach the compiler; quick steps take 3, 2, 1 and 9 s."""
    requests = []
    seconds = dict(zip(map(proposal.text_of, MESHES), (3.0, 2.0, 1.0, 9.0), strict=True))

    def stages(request):
        requests.append(request)
        mesh = request["mesh"]
        reason = request.get("mesh_reason", "given")
        kept = request["keep_program"]
        if mesh in refused:
            raise MeshError(f"no {mesh}")
        fits = mesh not in too_big
        quick = Planned(mesh, seconds[mesh] if fits else None, True, fits, reason)
        yield dataclasses.replace(quick, quick=fits, keep_program=kept)
        if fits:
            yield dataclasses.replace(quick, quick=False, keep_program=kept)

    refused, too_big = set(), set()
    monkeypatch.setattr(staged, "stages", stages)
    monkeypatch.setattr(
        proposal, "propose", lambda *_, **__: proposal.Proposal(MESHES, "the first")
    )
    stages.requests, stages.refused, stages.too_big = requests, refused, too_big
    return stages


def meshes(requests):
    return [request["mesh"] for request in requests]


def test_two_are_tried_and_one_that_cuts_otherwise():
    def tried(*texts):
        found = trial.worth_trying([MeshConfig.parse(text) for text in texts])
        return [proposal.text_of(mesh) for mesh in found]

    assert tried("fsdp=4", "data=2,fsdp=2", "fsdp=2,tensor=2") == [
        "fsdp=4",
        "data=2,fsdp=2",
        "fsdp=2,tensor=2",
    ]
    some = ("fsdp=4,tensor=2", "fsdp=2,data=2,tensor=2", "fsdp=1,data=4,tensor=2", "fsdp=8")
    assert tried(*some) == ["fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "fsdp=8"]
    assert tried("fsdp=4", "fsdp=2,expert=2", "data=2,fsdp=2", "fsdp=1,expert=4")[2] == "expert=4"
    assert tried("fsdp=4", "data=2,fsdp=2", "data=4,fsdp=1") == [
        "fsdp=4",
        "data=2,fsdp=2",
        "data=4",
    ]
    assert tried("fsdp=4") == ["fsdp=4"]


def test_the_quickest_of_three_is_planned(asked):
    quick, whole = trial.stages(REQUEST)
    assert quick.quick and not whole.quick
    assert quick.mesh == whole.mesh == "data=2,fsdp=2"
    assert meshes(asked.requests) == ["fsdp=4", "data=2,fsdp=2", "tensor=4", "data=2,fsdp=2"]
    reason = (
        "quickest of 3 compiled, of 4 that fit by estimate: "
        "fsdp=4 3 s, data=2,fsdp=2 2 s, tensor=4 9 s"
    )
    assert quick.mesh_reason == whole.mesh_reason == reason
    assert whole.plan_seconds > 0


def test_a_quick_plan_needs_no_second_compilation(asked):
    assert next(trial.stages(REQUEST)).mesh == "data=2,fsdp=2"
    assert len(asked.requests) == 3


def test_what_does_not_fit_or_compile_is_not_taken(asked):
    asked.too_big.add("data=2,fsdp=2")
    asked.refused.add("fsdp=4")
    quick, whole = trial.stages(REQUEST)
    assert quick.mesh == whole.mesh == "tensor=4"
    assert "data=2,fsdp=2 does not fit" in quick.mesh_reason
    asked.too_big.update(("fsdp=4", "tensor=4"))
    asked.refused.clear()
    (only,) = trial.stages(REQUEST)
    assert not only.fits
    asked.refused.update(map(proposal.text_of, MESHES))
    with pytest.raises(MeshError, match="no fsdp=4"):
        next(trial.stages(REQUEST))


def test_a_program_is_kept_of_the_chosen_mesh_alone(asked):
    quick, whole = trial.stages(REQUEST | dict(keep_program="program.txt"))
    assert quick.quick and quick.keep_program == whole.keep_program == "program.txt"
    kept = [request["mesh"] for request in asked.requests if request["keep_program"]]
    assert kept == ["data=2,fsdp=2"]


def test_one_possible_mesh_and_a_given_one_are_not_compared(asked, monkeypatch):
    assert [each.mesh for each in trial.stages(REQUEST | dict(mesh="data=4"))] == ["data=4"] * 2
    only = proposal.Proposal(MESHES[:1], "the only one")
    monkeypatch.setattr(proposal, "propose", lambda *_, **__: only)
    quick, whole = trial.stages(REQUEST)
    assert quick.mesh_reason == whole.mesh_reason == "the only one"
    assert meshes(asked.requests) == ["data=4", "fsdp=4"]


def test_sizes_that_are_none_are_told_before_anything_is_compiled(asked):
    with pytest.raises(UserError, match="must be at least 1"):
        next(trial.stages(REQUEST | dict(accumulation=0)))
    assert not asked.requests


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'olmax[tpu]')",
)
def test_a_plan_without_a_mesh_compares_some():
    found = plan(
        "olmo2-tiny", Topology.parse("v5e:2x2"), batch_size=8, sequence_length=512, quick=True
    )
    assert found.quick and found.fits
    assert found.mesh_reason.startswith("quickest of 3 compiled, of ")
