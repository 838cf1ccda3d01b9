"""Numbers with their standard errors, and what may be said of a difference."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean or a ratio, its standard error over `n` independent units (questions, documents)."""

    value: float
    stderr: float
    n: int

    def scaled(self, factor: float) -> "Estimate":
        """The same in another unit, for example percent with factor 100."""
        return Estimate(self.value * factor, self.stderr * abs(factor), self.n)

    def text(self, digits: int = 2, *, signed: bool = False) -> str:
        """`1.23 ± 0.04`; without the second half where the standard error is unknown."""
        sign = "+" if signed else ""
        value = f"{self.value:{sign}.{digits}f}"
        return value if math.isnan(self.stderr) else f"{value} ± {self.stderr:.{digits}f}"


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of `values` and its standard error s / sqrt(n) (nan below two values)."""
    x = np.asarray(values, np.float64)
    stderr = float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan
    return Estimate(float(x.mean()) if x.size else math.nan, stderr, int(x.size))


def mean_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean of `after - before` over the same units; pairing removes how hard each unit is."""
    return mean(np.asarray(after, np.float64) - np.asarray(before, np.float64))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum(numerators) / sum(denominators) over units, standard error by linearisation.

    Bits per byte of a set of documents is such a ratio: long documents weigh more.
    """
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    value = float(a.sum() / b.sum())
    n = a.size
    if n < 2:
        return Estimate(value, math.nan, n)
    residual = a - value * b
    stderr = math.sqrt(n / (n - 1) * float((residual**2).sum())) / float(b.sum())
    return Estimate(value, stderr, n)


def ratio_difference(
    before: Sequence[float], after: Sequence[float], denominators: Sequence[float]
) -> Estimate:
    """`ratio(after) - ratio(before)` over the same units and denominators."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return ratio(difference.tolist(), denominators)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates, such as the tasks of a suite."""
    k = len(estimates)
    stderr = math.sqrt(sum(e.stderr**2 for e in estimates)) / k
    return Estimate(sum(e.value for e in estimates) / k, stderr, sum(e.n for e in estimates))


Verdict = Literal["shown", "not shown", "reversed"]

STANDARD_ERRORS = 2.0
"""A difference counts when it is at least this many standard errors from zero."""


FEWEST_UNITS = 10
"""A standard error from fewer questions or documents is too uncertain to judge by."""


def judge(difference: Estimate, *, expected: Literal["up", "down"]) -> Verdict:
    """Whether a measured difference shows an effect expected to go `up` or `down`.

    `shown`: at least two standard errors in that direction. `reversed`: as far in the other one.
    `not shown`: anything between, and what comes from fewer than `FEWEST_UNITS`.
    """
    if math.isnan(difference.stderr) or difference.n < FEWEST_UNITS:
        return "not shown"
    towards = difference.value if expected == "up" else -difference.value
    if abs(towards) < STANDARD_ERRORS * difference.stderr or towards == 0:
        return "not shown"
    return "shown" if towards > 0 else "reversed"
