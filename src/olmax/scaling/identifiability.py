"""Whether the runs can tell the parameters apart, and how far equally good fits disagree."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from olmax.scaling.prepare import TaskData
from olmax.scaling.procedure import Procedure
from olmax.scaling.runs import Run

CLOSE = 0.02
"""Sizes, lengths or tokens per parameter that differ by less than this share count as one."""
EQUALLY_GOOD = 0.01
"""Share of the objective within which two fits count as equally good."""
WIDE = 0.05
"""Relative width of equally good predictions that is worth a warning."""


def _distinct(values: Sequence[float]) -> int:
    ordered = np.sort(np.log(np.asarray(values, np.float64)))
    return 1 + int(np.sum(np.diff(ordered) > CLOSE))


def design_warnings(runs: Sequence[Run], procedure: Procedure) -> list[str]:
    """What the choice of sizes and lengths alone rules out, in sentences.

    A power law with an offset takes three levels of its variable. With tokens proportional to
    parameters the two terms of L(N, D) cannot be told apart, whatever the number of runs.
    """
    found = []
    if procedure.step1 == "power_c":
        levels = _distinct([run.parameters * run.tokens[-1] for run in runs])
        if levels < 3:
            found.append(
                f"{levels} levels of compute cannot determine A, alpha and E; give 3 or more"
            )
        return found
    sizes = _distinct([run.parameters for run in runs])
    lengths = _distinct([run.tokens[-1] for run in runs])
    if sizes < 3:
        what = "a single size" if sizes == 1 else f"{sizes} sizes"
        found.append(
            f"{what} ({', '.join(sorted({run.size for run in runs}))}) cannot determine A, alpha "
            "and E of L(N, D); give at least 3 sizes"
        )
    if lengths < 3:
        found.append(
            f"{lengths} lengths cannot determine B, beta and E of L(N, D); give at least 3"
        )
    if len(runs) > 2 and _distinct([run.tokens[-1] / run.parameters for run in runs]) == 1:
        found.append(
            "tokens are proportional to parameters in all runs: the terms of N and of D cannot be "
            "told apart; add runs of another length"
        )
    return found


@dataclasses.dataclass(frozen=True)
class EquallyGood:
    """Predictions of step 1 at a target that fit the runs equally well."""

    best: float
    low: float
    high: float

    @property
    def relative_width(self) -> float:
        """(high - low) / best."""
        return (self.high - self.low) / self.best

    @property
    def flat(self) -> bool:
        """Whether the objective leaves the prediction open."""
        return self.relative_width > WIDE


def equally_good_range(
    prepared: Sequence[TaskData],
    target: np.ndarray,
    *,
    delta: float,
    tolerance: float = EQUALLY_GOOD,
    points: int = 41,
    span: float = 3.0,
) -> list[EquallyGood]:
    """Range of step 1's prediction at `target` over fits within `tolerance` of the best objective.

    Each of `points` values between best / span and best * span is forced at the target by a heavy
    extra point, and everything else is refitted around it: the profile of the objective.

    Args:
      prepared: tasks over the same runs.
      target: float64 [inputs].
      delta: of the Huber objective.
    """
    from olmax.scaling import batched

    law, inputs = prepared[0].step1_law, prepared[0].inputs
    runs = prepared[0].runs
    weights = np.stack([data.weights for data in prepared])
    starts = batched.shared_starts(law)
    best = batched.solve_huber(
        law, inputs, np.stack([data.values for data in prepared]), weights, starts, delta=delta
    )
    centres = law(best.parameters, *target)
    # Fine near the best value, coarse further out.
    steps = np.linspace(-1, 1, points)
    factors = np.exp(np.log(span) * np.sign(steps) * np.abs(steps) ** 2.5)
    values = np.concatenate(
        [
            np.column_stack([np.broadcast_to(data.values, (points, runs)), centre * factors])
            for data, centre in zip(prepared, centres, strict=True)
        ]
    )
    heavy = np.repeat(np.column_stack([weights, 1e3 * weights.sum(1)]), points, 0)
    extended = np.concatenate([inputs, target[:, None]], 1)
    near = np.repeat(best.parameters[:, None], points, 0)
    spread = np.broadcast_to(starts[:4], (len(near), *starts[:4].shape))
    found = batched.solve_huber(
        law, extended, values, heavy, np.concatenate([near, spread], 1), delta=delta
    )
    for _ in range(2):
        # The profile is continuous, so a neighbour's solution is a good start.
        grid = found.parameters.reshape(len(prepared), points, -1)
        lent = np.stack([np.roll(grid, shift, 1) for shift in (-1, 1)], 2)
        lent = lent.reshape(len(values), 2, -1)
        found = batched.polish_huber(law, extended, values, heavy, lent, delta=delta).better(found)
    ranges = []
    for number, data in enumerate(prepared):
        fits = found.parameters[number * points : (number + 1) * points]
        plain = batched.huber_objectives(
            law, inputs, data.values, weights[number][None], fits, delta
        )
        # Few runs can be fitted nearly exactly; residuals of 1e-4 are then as good as none.
        limit = best.objective[number] * (1 + tolerance) + 0.5e-8 * data.weights.sum()
        reached = law(fits, *target)
        inside = np.append(reached[plain[0] <= limit], centres[number])
        ranges.append(EquallyGood(float(centres[number]), float(inside.min()), float(inside.max())))
    return ranges
