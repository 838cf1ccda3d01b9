"""How a ladder is fitted: what goes in, which laws, which weights. The default is the paper's."""

import dataclasses
from typing import Literal

from olmax.errors import UserError
from olmax.scaling.laws import (
    LOG_SIGMOID,
    NEGATIVE_POWER_ND,
    POWER_C,
    POWER_ND,
    SIGMOID,
    SINGLE_STEP,
    Law,
)
from olmax.scaling.reference import HUBER_DELTA
from olmax.scaling.tasks import Metric, Task


@dataclasses.dataclass(frozen=True)
class Procedure:
    """Settings of both steps.

    The defaults are the published procedure for task loss; `VARIANTS` has the published others.
    """

    feature: Literal["task_loss", "c4", "task_ce"] = "task_loss"
    """What step 1 predicts and step 2 turns into accuracy."""
    step1: Literal["power_nd", "power_c", "single_step", "negative_power_nd"] = "power_nd"
    """Law of step 1. The last two give accuracy directly, there is no step 2 then."""
    step2: Literal["sigmoid", "log_sigmoid"] = "sigmoid"
    accuracy: Literal["rc_accuracy", "mc_accuracy"] = "rc_accuracy"
    last: int = 5
    """Checkpoints averaged into the one value of a run, in step 1 and for actual values."""
    skip: float = 0.1
    """Share of a run's first checkpoints that step 2 leaves out."""
    window: int = 5
    """Checkpoints of step 2's trailing mean."""
    delta: float = HUBER_DELTA
    """Step 1: log residual where squared turns into absolute; `inf` for least squares."""
    perfect_point: bool = True
    """Helper point of step 2: accuracy 1 at loss 0."""
    chance_points: int = 0
    """Helper points of step 2: this many at chance, at the largest feature seen."""
    floor: Literal["free", "chance"] = "free"
    """Whether the sigmoid falls to a fitted level or to the task's chance."""
    weights: Literal["checkpoints", "runs"] = "checkpoints"
    """Step 2: every checkpoint counts the same, or every run does."""
    step1_weights: Literal["equal", "size"] = "equal"
    """Step 1: runs count the same, or in proportion to the logarithm of their compute above the
    smallest run's (1 for the smallest, 3 for the largest)."""

    search: Literal["published", "many"] = "published"
    """`many`: both steps also start from a spread of places, and the best fit is kept. The one
    published start suffices for the released ladder, not for ladders of other sizes."""

    def __post_init__(self):
        if self.last < 1 or self.window < 1:
            raise UserError("last and window count checkpoints; give 1 or more")
        if not 0 <= self.skip < 1:
            raise UserError(
                f"skip={self.skip}: give the share of checkpoints to leave out, below 1"
            )
        if self.chance_points < 0:
            raise UserError(f"chance_points={self.chance_points}: give 0 or more")
        if self.delta <= 0:
            raise UserError(f"delta={self.delta} must be positive")
        if self.floor == "chance" and self.step2 != "sigmoid":
            raise UserError("floor='chance' needs step2='sigmoid'; the log-sigmoid has no floor")

    @property
    def chained(self) -> bool:
        """Whether there are two steps."""
        return self.step1 in ("power_nd", "power_c")

    @property
    def step1_metric(self) -> Metric:
        """What step 1 is fitted to."""
        return self.feature if self.chained else self.accuracy

    def step1_law(self, task: Task) -> Law:
        """Law of step 1 with its bounds and start."""
        if self.step1 == "single_step":
            return SINGLE_STEP.started((*SINGLE_STEP.start[:5], task.chance - 1, 1.0))
        return {
            "power_nd": POWER_ND,
            "power_c": POWER_C,
            "negative_power_nd": NEGATIVE_POWER_ND,
        }[self.step1]

    def step2_law(self, task: Task) -> Law | None:
        """Law of step 2 with its bounds and start; None where step 1 gives accuracy."""
        if not self.chained:
            return None
        if self.step2 == "log_sigmoid":
            return LOG_SIGMOID
        law = SIGMOID.started((task.chance - 1, *SIGMOID.start[1:]))
        if self.floor == "chance":
            # With the ceiling b near 1 the floor a + b is chance up to the width of these bounds.
            return law.bounded(a=(task.chance - 1, task.chance - 0.999), b=(0.999, 1.0))
        return law


PUBLISHED = Procedure()
"""Two steps over task loss: the paper's main results."""

VARIANTS: dict[str, Procedure] = {
    "task_loss": PUBLISHED,
    "flops": Procedure(step1="power_c"),
    "c4": Procedure(feature="c4"),
    "task_ce": Procedure(
        feature="task_ce", step2="log_sigmoid", last=1, window=1, skip=0.5, perfect_point=False
    ),
    "single_step": Procedure(step1="single_step"),
    "direct_accuracy": Procedure(step1="negative_power_nd"),
    "multiple_choice": Procedure(accuracy="mc_accuracy", skip=0.0, floor="chance"),
}
"""The paper's design choices by name."""
