"""Choosing a mesh by quick plans.

Estimates (`proposal`) rank all meshes at once, but not those that are nearly as good as another.
A few are compiled as far as a quick plan needs; the one with the quickest step is taken.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from olmax.models.presets import get_preset
from olmax.planning import compilation, proposal, staged
from olmax.sharding import MeshConfig

if TYPE_CHECKING:
    from olmax.planning.plan import Plan


def stages(request: dict[str, Any]) -> Generator["Plan"]:
    """`staged.stages`, with a mesh chosen where the request has None.

    Raises:
      UserError: as there, or no mesh divides the batch and the model.
      RuntimeError: as there.
    """
    if request["mesh"] is not None:
        yield from staged.stages(request)
        return
    start = time.monotonic()
    model = request["model"]
    sizes = [request[name] for name in ("batch_size", "sequence_length", "accumulation")]
    compilation.check_sizes(*sizes)
    batch_size, sequence_length, accumulation = sizes
    proposed = proposal.propose(
        get_preset(model) if isinstance(model, str) else model,
        request["topology"],
        batch_size,
        sequence_length,
        accumulation=accumulation,
    )
    mesh, reason, shown = proposal.text_of(proposed.mesh), proposed.reason, False
    if len(proposed.meshes) > 1:
        mesh, plan = _quickest(request, proposed.meshes)
        reason, shown = plan.mesh_reason, request["keep_program"] is None
        if shown:
            yield dataclasses.replace(plan, plan_seconds=time.monotonic() - start)
        if shown and not plan.quick:
            return
    # Its compiler was stopped, to have the machine for the others, and starts again.
    chosen = request | dict(mesh=mesh, mesh_reason=reason)
    with contextlib.closing(staged.stages(chosen)) as running:
        for plan in running:
            if not (shown and plan.quick):
                yield dataclasses.replace(plan, plan_seconds=time.monotonic() - start)


def worth_trying(meshes: Sequence[MeshConfig]) -> list[MeshConfig]:
    """Three of meshes that are ordered by estimate: the first two, which may be nearly as good as
    each other, and the first that cuts products or experts in another way than these, where the
    estimate is less sure.
    """
    first = list(meshes[:2])
    ways = {(mesh.tensor, mesh.expert) for mesh in first}
    rest = sorted(meshes[2:], key=lambda mesh: (mesh.tensor, mesh.expert) in ways)
    return first + rest[:1]


def _quickest(request: dict[str, Any], possible: Sequence[MeshConfig]) -> tuple[str, "Plan"]:
    """The quickest `worth_trying`, and its plan; one that does not fit only if none does."""
    plans: dict[str, Plan] = {}
    problem: compilation.MeshError | None = None
    for mesh in map(proposal.text_of, worth_trying(possible)):
        trial = request | dict(mesh=mesh, keep_program=None)
        try:
            with contextlib.closing(staged.stages(trial)) as running:
                plans[mesh] = next(running)
        except compilation.MeshError as error:
            problem = problem or error
    if problem is not None and not plans:
        raise problem
    mesh, plan = min(plans.items(), key=_order)
    times = ", ".join(f"{name} {_seconds(other)}" for name, other in plans.items())
    reason = f"quickest of {len(plans)} compiled, of {len(possible)} that fit by estimate: {times}"
    return mesh, dataclasses.replace(plan, mesh_reason=reason)


def _order(item: tuple[str, "Plan"]):
    _, plan = item
    seconds = math.inf if plan.step_seconds is None else plan.step_seconds
    return not plan.fits, seconds, plan.per_device_bytes.total


def _seconds(plan: "Plan") -> str:
    return f"{plan.step_seconds:.3g} s" if plan.fits else "does not fit"
