"""The functional forms: value, derivatives, bounds and the published start of each.

A law is written once for numpy and jax.numpy (`xp`) on arrays whose last axis runs over points, so
that the published procedure and the batched solver share one definition. Parameters come as a
sequence of arrays that broadcast against the points.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = Any
INF = float("inf")


@dataclasses.dataclass(frozen=True)
class Law:
    """y = f(x; p)."""

    name: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    start: tuple[float, ...]
    """The published start."""
    function: Callable[[Any, Any, Any], tuple[Array, list[Array]]]
    """(xp, parameters, inputs) -> value and its derivative by each parameter."""
    formula: str
    """For people, with the parameters' names."""
    blocks: tuple[tuple[int, ...], ...] = ()
    """Parameters that trade against each other most, in pairs; solvers damp them together."""
    curvature: (
        Callable[[Any, Sequence[Array], Sequence[Array]], dict[tuple[int, int], Array]] | None
    ) = None
    """(xp, parameters, inputs) -> second derivatives that are not zero, by (i, j) with i <= j."""
    released: Callable[[Any, Any, Any], tuple[Array, list[Array]]] | None = None
    """The same function in the arithmetic of the released code where that is less stable: where its
    optimiser stops in a flat valley depends on the rounding, and so do its published numbers."""

    def __call__(self, parameters: Sequence[float] | np.ndarray, *inputs: Any) -> np.ndarray:
        """Value in float64; parameters [..., P] broadcast against inputs."""
        p = np.moveaxis(np.asarray(parameters, np.float64), -1, 0)
        with np.errstate(over="ignore"):
            return self.function(np, p, [np.asarray(x, np.float64) for x in inputs])[0]

    def bounded(self, **bounds: tuple[float, float]) -> "Law":
        """The same law with other (lower, upper) bounds for some parameters; the start is moved
        into them.
        """
        lower, upper, start = list(self.lower), list(self.upper), list(self.start)
        for name, (low, high) in bounds.items():
            i = self.parameters.index(name)
            lower[i], upper[i] = low, high
            start[i] = min(max(start[i], low), high)
        return dataclasses.replace(self, lower=tuple(lower), upper=tuple(upper), start=tuple(start))

    def started(self, start: Sequence[float]) -> "Law":
        """The same law with another start."""
        return dataclasses.replace(self, start=tuple(float(s) for s in start))

    def at_bounds(
        self, parameters: Sequence[float] | np.ndarray, tolerance: float = 1e-6
    ) -> tuple[str, ...]:
        """Names of the parameters that lie at a bound."""
        found = []
        for name, p, low, high in zip(
            self.parameters, parameters, self.lower, self.upper, strict=True
        ):
            scale = tolerance * max(1.0, abs(p))
            if p - low <= scale or high - p <= scale:
                found.append(name)
        return tuple(found)


def _power_nd(xp, p, x):
    log_a, log_b, alpha, beta, e = p
    log_n, log_d = xp.log(x[0]), xp.log(x[1])
    first, second = xp.exp(log_a - alpha * log_n), xp.exp(log_b - beta * log_d)
    value = first + second + e
    return value, [first, second, -log_n * first, -log_d * second, xp.ones_like(value)]


def _power_nd_curvature(xp, p, x):
    log_a, log_b, alpha, beta, _ = p
    log_n, log_d = xp.log(x[0]), xp.log(x[1])
    first, second = xp.exp(log_a - alpha * log_n), xp.exp(log_b - beta * log_d)
    return {
        (0, 0): first,
        (0, 2): -log_n * first,
        (2, 2): log_n**2 * first,
        (1, 1): second,
        (1, 3): -log_d * second,
        (3, 3): log_d**2 * second,
    }


def _negative_power_nd_curvature(xp, p, x):
    return {key: -value for key, value in _power_nd_curvature(xp, p, x).items()}


def _negative_power_nd(xp, p, x):
    value, slopes = _power_nd(xp, (p[0], p[1], p[2], p[3], -p[4]), x)
    return -value, [-slope for slope in slopes[:4]] + [slopes[4]]


def _power_c(xp, p, x):
    log_a, alpha, e = p
    log_c = xp.log(x[0])
    term = xp.exp(log_a - alpha * log_c)
    value = term + e
    return value, [term, -log_c * term, xp.ones_like(value)]


def _power_c_curvature(xp, p, x):
    log_a, alpha, _ = p
    log_c = xp.log(x[0])
    term = xp.exp(log_a - alpha * log_c)
    return {(0, 0): term, (0, 1): -log_c * term, (1, 1): log_c**2 * term}


def _logistic(xp, z):
    # The two branches keep exp from overflowing on either side, the bound from underflowing.
    small = xp.exp(-xp.minimum(xp.abs(z), 700.0))
    return xp.where(z >= 0, 1 / (1 + small), small / (1 + small))


def _sigmoid(xp, p, x):
    a, l0, k, b = p
    s = _logistic(xp, k * (x[0] - l0))
    slope = a * s * (1 - s)
    value = a * s + b
    return value, [s, -k * slope, (x[0] - l0) * slope, xp.ones_like(value)]


def _log_sigmoid(xp, p, x):
    a, l0, k = p
    z = k * (x[0] - l0)
    # ln(1 - sigmoid(z)) = -softplus(z)
    softplus = xp.maximum(z, 0) + xp.log1p(xp.exp(-xp.abs(z)))
    s = _logistic(xp, z)
    return 1 + a * softplus, [softplus, -a * s * k, a * s * (x[0] - l0)]


# Below this a single-step prediction is cut off, because its logarithm is compared.
SMALLEST_ACCURACY = 1e-6


def _log_sigmoid_released(xp, p, x):
    a, l0, k = p
    s = 1 / (1 + xp.exp(-k * (x[0] - l0)))
    softplus = -xp.log(1 - s)
    return 1 + a * softplus, [softplus, -a * s * k, a * s * (x[0] - l0)]


def _single_step(xp, p, x):
    inner, slopes = _power_nd(xp, p[:5], x)
    s = _logistic(xp, inner)
    value = p[5] * s + p[6]
    outer = p[5] * s * (1 - s)
    return xp.maximum(value, SMALLEST_ACCURACY), [
        *(outer * slope for slope in slopes),
        s,
        xp.ones_like(value),
    ]


def _single_step_curvature(xp, p, x):
    inner, slopes = _power_nd(xp, p[:5], x)
    s = _logistic(xp, inner)
    bend = s * (1 - s)
    twice = bend * (1 - 2 * s)
    found = {(i, j): p[5] * twice * slopes[i] * slopes[j] for i in range(5) for j in range(i, 5)}
    for key, value in _power_nd_curvature(xp, p[:5], x).items():
        found[key] = found[key] + p[5] * bend * value
    found.update({(i, 5): bend * slopes[i] for i in range(5)})
    return found


def _single_step_released(xp, p, x):
    first, second = xp.exp(p[0]) / xp.power(x[0], p[2]), xp.exp(p[1]) / xp.power(x[1], p[3])
    s = 1 / (1 + xp.exp(-(first + second + p[4])))
    value = xp.maximum(p[5] * s + p[6], SMALLEST_ACCURACY)
    outer = p[5] * s * (1 - s)
    return value, [
        outer * first,
        outer * second,
        outer * xp.exp(p[0]) * (-xp.log(x[0])) / xp.power(x[0], p[2]),
        outer * xp.exp(p[1]) * (-xp.log(x[1])) / xp.power(x[1], p[3]),
        outer,
        s,
        xp.ones_like(value),
    ]


POWER_ND = Law(
    name="power_nd",
    parameters=("log_A", "log_B", "alpha", "beta", "E"),
    inputs=("N", "D"),
    lower=(0.0,) * 5,
    upper=(INF,) * 5,
    start=(3.0, 6.0, 0.1, 0.2, 1.0),
    function=_power_nd,
    blocks=((0, 2), (1, 3)),
    curvature=_power_nd_curvature,
    formula="L = A / N^alpha + B / D^beta + E",
)
NEGATIVE_POWER_ND = Law(
    name="negative_power_nd",
    parameters=("log_A", "log_B", "alpha", "beta", "E"),
    inputs=("N", "D"),
    lower=(0.0, 0.0, 0.0, -INF, -INF),
    upper=(INF,) * 5,
    start=(2.0, 2.0, 0.2, 0.2, 1.0),
    function=_negative_power_nd,
    blocks=((0, 2), (1, 3)),
    curvature=_negative_power_nd_curvature,
    formula="Acc = -A / N^alpha - B / D^beta + E",
)
POWER_C = Law(
    name="power_c",
    parameters=("log_A", "alpha", "E"),
    inputs=("C",),
    lower=(0.0, 0.0, 0.0),
    upper=(INF, 1.0, INF),
    start=(3.0, 0.1, 1.0),
    function=_power_c,
    blocks=((0, 1),),
    curvature=_power_c_curvature,
    formula="L = A / C^alpha + E",
)
SINGLE_STEP = Law(
    name="single_step",
    parameters=("log_A", "log_B", "alpha", "beta", "E", "p", "q"),
    inputs=("N", "D"),
    lower=(0.0, 0.0, 0.0, 0.0, -INF, -1.0, 0.0),
    upper=(INF, INF, INF, INF, INF, 0.0, 1.0),
    start=(3.0, 5.0, 0.2, 0.3, 0.0, -0.75, 1.0),
    function=_single_step,
    blocks=((0, 2), (1, 3), (5, 6)),
    curvature=_single_step_curvature,
    formula="Acc = p sigmoid(A / N^alpha + B / D^beta + E) + q",
    released=_single_step_released,
)
SIGMOID = Law(
    name="sigmoid",
    parameters=("a", "L0", "k", "b"),
    inputs=("L",),
    lower=(-1.0, 0.0, 0.0, 0.0),
    upper=(0.0, INF, INF, 1.0),
    start=(-0.75, 0.9, 3.0, 1.0),
    function=_sigmoid,
    blocks=((0, 3),),
    formula="Acc = a / (1 + exp(-k (L - L0))) + b",
)
LOG_SIGMOID = Law(
    name="log_sigmoid",
    parameters=("a", "L0", "k"),
    inputs=("L",),
    lower=(-INF, 0.0, 0.0),
    upper=(0.0, INF, INF),
    start=(-0.1, 0.9, 3.0),
    function=_log_sigmoid,
    formula="Acc = 1 - a ln(1 - sigmoid(k (L - L0)))",
    released=_log_sigmoid_released,
)

LAWS = {
    law.name: law
    for law in (POWER_ND, NEGATIVE_POWER_ND, POWER_C, SINGLE_STEP, SIGMOID, LOG_SIGMOID)
}
