"""The published optimisers: L-BFGS-B on a Huber objective and bounded least squares, from scipy.

One start, one problem at a time. `olmax.scaling.batched` solves the same problems by the thousand.
"""

import dataclasses

import numpy as np

from olmax.scaling.laws import INF, Law
from olmax.scaling.portable import PORTABLE, optimize

HUBER_DELTA = 1e-3
"""Where the objective turns from squared to absolute, in log units."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """Where an optimiser stopped."""

    parameters: np.ndarray
    """float64 [P]."""
    objective: float
    message: str
    """The optimiser's own words."""


def huber(residual: np.ndarray, delta: float = HUBER_DELTA) -> np.ndarray:
    """r^2 / 2 up to `delta`, then the tangent."""
    size = np.abs(residual)
    return np.where(size < delta, 0.5 * residual**2, delta * (size - 0.5 * delta))


def huber_objective(
    law: Law,
    parameters: np.ndarray,
    inputs: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray | None = None,
    delta: float = HUBER_DELTA,
) -> float:
    """Sum over points of huber(ln f - ln y); a sum, because the mean stops optimisers early.

    Args:
      law: the form.
      parameters: [P].
      inputs: [number of inputs, points].
      values: [points], positive.
      weights: [points], 1 when not given.
      delta: see `huber`.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        residual = np.log(law(parameters, *inputs)) - np.log(values)
    terms = huber(residual, delta)
    return float(np.sum(terms if weights is None else weights * terms))


def minimise_huber(
    law: Law,
    inputs: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray | None = None,
    delta: float = HUBER_DELTA,
    start: tuple[float, ...] | None = None,
) -> Solution:
    """L-BFGS-B with the analytic gradient from one start; arguments as `huber_objective`.

    Tolerances are the published ones (no stop by the objective's change, gradient 1e-10).
    """
    log_values = PORTABLE.log(values)
    w = np.ones_like(log_values) if weights is None else np.asarray(weights, np.float64)

    function = law.released or law.function

    def value_and_gradient(p):
        with np.errstate(all="ignore"):
            y, slopes = function(PORTABLE, p, inputs)
            residual = PORTABLE.log(y) - log_values
            total = np.sum(w * huber(residual, delta))
            inner = np.where(np.abs(residual) < delta, residual, delta * np.sign(residual)) * w / y
            return total, np.array([np.sum(inner * slope) for slope in slopes])

    bounds = [
        (None if low == -INF else low, None if high == INF else high)
        for low, high in zip(law.lower, law.upper, strict=True)
    ]
    result = optimize.minimize(
        value_and_gradient,
        np.asarray(start or law.start),
        jac=True,
        bounds=bounds,
        tol=0.0,
        method="L-BFGS-B",
        options={"ftol": 0.0, "gtol": 1e-10, "maxiter": 1_000_000},
    )
    return Solution(result.x, float(result.fun), str(result.message))


def minimise_squares(
    law: Law,
    inputs: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray | None = None,
    start: tuple[float, ...] | None = None,
) -> Solution:
    """Bounded least squares of `scipy.optimize.curve_fit` from one start, numerical Jacobian.

    Args:
      law: the form.
      inputs: [1, points].
      values: [points].
      weights: [points], 1 when not given.
      start: the law's when not given.

    The objective is the sum of weighted squares.
    """
    x = inputs[0]

    released = law.released or law.function

    def function(x, *p):
        with np.errstate(all="ignore"):
            return released(PORTABLE, p, [x])[0]

    sigma = None if weights is None else 1 / np.sqrt(weights)
    p, _, _, message, _ = optimize.curve_fit(
        function,
        x,
        values,
        p0=np.asarray(start or law.start),
        sigma=sigma,
        bounds=(law.lower, law.upper),
        maxfev=500_000,
        full_output=True,
    )
    residual = law(p, x) - values
    total = np.sum(residual**2 if weights is None else weights * residual**2)
    return Solution(np.asarray(p), float(total), str(message))
