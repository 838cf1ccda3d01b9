"""Thousands of small bounded fits at once, in JAX and float64.

Each problem is the published objective of one step with its own weights (a resample of the runs)
and its own start. The solver is a damped Newton method on the box of the law's bounds:
Levenberg-Marquardt damping in the metric of the model's own Jacobian, so that long valleys are
walked quickly, and an active set for parameters that press against a bound.

float64 is switched on inside the calls only; the process's setting is left alone.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from olmax.scaling.laws import INF, LAWS, Law
from olmax.scaling.reference import HUBER_DELTA

RELATIVE_STOP = 1e-11
"""A problem is done when a nearly undamped step improves its objective by less than this share."""
_FAR = 1e6  # stands in for infinite bounds: no fit of a ladder comes near it
_BLOCK = 15  # iterations between two compactions of the problems still open
_CHUNKS = {"huber": 256, "squares": 16}  # problems per call: what stays in a cache
_POINTS = 16  # the number of fitted points is rounded up to a multiple of it


@dataclasses.dataclass(frozen=True)
class BatchSolution:
    """Best result of each problem over its starts."""

    parameters: np.ndarray
    """float64 [R, P]."""
    objective: np.ndarray
    """float64 [R]."""
    converged: np.ndarray
    """bool [R]: the best start's last steps changed nothing any more."""

    def better(self, other: "BatchSolution") -> "BatchSolution":
        """Per problem the one with the lower objective."""
        mine = self.objective <= other.objective
        return BatchSolution(
            np.where(mine[:, None], self.parameters, other.parameters),
            np.where(mine, self.objective, other.objective),
            np.where(mine, self.converged, other.converged),
        )


def solve_huber(
    law: Law,
    inputs: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    *,
    delta: float = HUBER_DELTA,
    iterations: int = 600,
) -> BatchSolution:
    """Minimises sum_m w_m huber(ln f(x_m; p) - ln y_m) for R problems over one set of inputs.

    Args:
      law: the form.
      inputs: float64 [number of inputs, M], shared.
      values: float64 [R, M] or [M], positive.
      weights: float64 [R, M], not negative.
      starts: float64 [S, P] shared or [R, S, P].
      delta: where the objective turns linear.
      iterations: at most, for each start and each stage of the continuation.
    """
    r, m = weights.shape
    values = np.broadcast_to(values, (r, m))
    starts = np.broadcast_to(starts, (r, *starts.shape[-2:]))
    s = starts.shape[1]
    inputs, log_values, weights = _padded_points(inputs, np.log(values), weights)
    data = (np.repeat(log_values, s, 0), np.repeat(weights, s, 0))
    p = np.clip(starts.reshape(r * s, -1), law.lower, law.upper)
    # The objective is nearly an absolute deviation. Falling deltas lead into it from the smooth
    # side, which keeps most starts out of its kinks.
    for stage, width in enumerate((100 * delta, 10 * delta, 3 * delta)):
        if np.isfinite(width) and width < 1:
            p, *_ = _drive(law, "huber", inputs, data, p, width, 15 if stage else 30)
    p, f, done = _drive(law, "huber", inputs, data, p, min(delta, 1e3), iterations)
    return _best(p, f, done, r, s)


def polish_huber(
    law: Law,
    inputs: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    *,
    delta: float = HUBER_DELTA,
    iterations: int = 600,
) -> BatchSolution:
    """As `solve_huber` without the continuation: goes downhill from the starts, so it ends no
    higher than the lowest of them.
    """
    r, m = weights.shape
    values = np.broadcast_to(values, (r, m))
    starts = np.broadcast_to(starts, (r, *starts.shape[-2:]))
    s = starts.shape[1]
    inputs, log_values, weights = _padded_points(inputs, np.log(values), weights)
    data = (np.repeat(log_values, s, 0), np.repeat(weights, s, 0))
    p = np.clip(starts.reshape(r * s, -1), law.lower, law.upper)
    p, f, done = _drive(law, "huber", inputs, data, p, min(delta, 1e3), iterations)
    return _best(p, f, done, r, s)


def huber_objectives(
    law: Law,
    inputs: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    parameters: np.ndarray,
    delta: float = HUBER_DELTA,
) -> np.ndarray:
    """float64 [R, Q]: the objective of problem r at parameters q.

    Args:
      values: [R, M] or [M].
      weights: [R, M].
      parameters: [Q, P].
    """
    with np.errstate(all="ignore"):
        log_fit = np.log(law(parameters[:, None, :], *(x[None] for x in inputs)))  # [Q, M]
    if np.ndim(values) == 1:
        size = np.abs(log_fit - np.log(values))
        terms = np.where(size < delta, 0.5 * size**2, delta * (size - 0.5 * delta))
        return np.nan_to_num(weights @ terms.T, nan=np.inf)
    size = np.abs(log_fit[None] - np.log(values)[:, None])
    terms = np.where(size < delta, 0.5 * size**2, delta * (size - 0.5 * delta))
    return np.nan_to_num(np.einsum("rm,rqm->rq", weights, terms), nan=np.inf)


def solve_squares(
    law: Law,
    inputs: np.ndarray,
    values: np.ndarray,
    groups: np.ndarray,
    group_weights: np.ndarray,
    starts: np.ndarray,
    *,
    iterations: int = 300,
) -> BatchSolution:
    """Minimises sum_m w_m (f(x_m; p) - y_m)^2 for R problems over one set of points.

    Args:
      law: the form.
      inputs: float64 [1, M], shared.
      values: float64 [M], shared.
      groups: int [M]: which group (run) a point belongs to.
      group_weights: float64 [R, G]: weight of each group in each problem.
      starts: float64 [S, P] shared or [R, S, P].
      iterations: at most, for each start.
    """
    r = group_weights.shape[0]
    starts = np.broadcast_to(starts, (r, *starts.shape[-2:]))
    s = starts.shape[1]
    data = (np.repeat(group_weights, s, 0),)
    p = np.clip(starts.reshape(r * s, -1), law.lower, law.upper)
    shared = (inputs, values, np.asarray(groups, np.int32))
    p, f, done = _drive(law, "squares", shared, data, p, 0.0, iterations)
    return _best(p, f, done, r, s)


def _best(p, f, done, r: int, s: int) -> BatchSolution:
    p, f, done = p.reshape(r, s, -1), f.reshape(r, s), done.reshape(r, s)
    best = np.argmin(np.where(np.isfinite(f), f, np.inf), axis=1)
    rows = np.arange(r)
    return BatchSolution(p[rows, best], f[rows, best], done[rows, best])


def _drive(law: Law, kind: str, shared, data, p, delta: float, iterations: int):
    """Runs blocks of iterations, keeping only problems that are still moving."""
    total = len(p)
    p = np.array(p, np.float64)
    f = np.full(total, np.inf)
    damping = np.full((total, 2 if kind == "huber" else 1), 1e-2)
    done = np.zeros(total, bool)
    left = np.arange(total)
    used = 0

    def run(chunk: np.ndarray):
        # The switch to float64 belongs to a thread.
        with jax.enable_x64(True):
            out = _block(
                law.name,
                kind,
                min(_BLOCK, iterations - used),
                _box(law),
                shared,
                tuple(d[chunk] for d in data),
                p[chunk],
                damping[chunk],
                delta,
            )
            return [np.asarray(o) for o in out]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        while len(left) and used < iterations:
            chunks = _chunks(left, _CHUNKS[kind])
            for chunk, out in zip(chunks, threads.map(run, chunks), strict=True):
                p[chunk], f[chunk], damping[chunk], done[chunk] = out
            left = left[~done[left]]
            used += _BLOCK
    return p, f, done


def _chunks(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Indices in pieces of one size, which is compiled once; the last is filled up by repeating."""
    missing = -len(indices) % size
    filled = np.concatenate([indices, np.full(missing, indices[0])])
    return list(filled.reshape(-1, size))


def _box(law: Law) -> tuple[tuple[float, ...], tuple[float, ...]]:
    lower = tuple(-_FAR if low == -INF else low for low in law.lower)
    upper = tuple(_FAR if high == INF else high for high in law.upper)
    return lower, upper


def _padded_points(
    inputs: np.ndarray, log_values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same problems with a multiple of `_POINTS` points, the added ones of weight zero.

    A few more or fewer runs are then one compiled program.
    """
    m = weights.shape[1]
    place = np.minimum(np.arange(-(-m // _POINTS) * _POINTS), m - 1)
    weights = np.where(np.arange(len(place)) < m, weights[:, place], 0.0)
    return inputs[:, place], log_values[:, place], weights


@functools.partial(jax.jit, static_argnames=("law", "kind"))
def _block(law: str, kind: str, iterations, box, shared, data, p, damping, delta):
    """`iterations` damped Newton steps on a batch: (p, objective, damping, done).

    Problems lie on the last axis inside, parameters and matrix entries in Python lists: arithmetic
    on a few long vectors is many times faster than batches of tiny matrices.
    """
    evaluate = {"huber": _huber_model, "squares": _squares_model}[kind]
    model = functools.partial(evaluate, LAWS[law], shared, data, delta)

    def cond(state):
        return (state[0] < iterations) & ~state[-1].all()

    def body(state):
        i, p, local, damping, done = state
        blocks = LAWS[law].blocks
        best_p, best, settled = p, local, jnp.ones_like(done)
        new_damping = []
        # Two steps are tried: with the reweighted Gauss-Newton matrix, which is safe far away,
        # and with the true Hessian, which converges where the kinks have been sorted out.
        for matrix, how_much in zip(local[2], damping, strict=True):
            q, definite = _step(p, local[1], matrix, local[3], blocks, how_much, *box)
            new = model(q)
            good = definite & jnp.isfinite(new[0]) & (new[0] < local[0])
            gain = jnp.where(good, local[0] - new[0], 0.0)
            settled &= (gain <= RELATIVE_STOP * local[0]) & (
                (good & (how_much < 1e-1)) | (how_much > 1e8)
            )
            new_damping.append(
                jnp.where(good, jnp.maximum(how_much * 0.2, 1e-12), jnp.minimum(how_much * 4, 1e10))
            )
            better = good & (new[0] < best[0]) & ~done
            best_p, best = jax.tree.map(
                lambda a, b, better=better: jnp.where(better, a, b), (q, new), (best_p, best)
            )
        # An exact fit has nothing left to gain.
        settled |= local[0] < 1e-26
        return i + 1, best_p, best, new_damping, done | settled

    columns = list(p.T)
    start = (0, columns, model(columns), list(damping.T), jnp.zeros(p.shape[0], bool))
    _, columns, local, damping, done = jax.lax.while_loop(cond, body, start)
    return jnp.stack(columns, -1), local[0], jnp.stack(damping, -1), done


def _pairs(count: int):
    return [(i, j) for i in range(count) for j in range(i, count)]


def _huber_model(law: Law, inputs, data, delta, p):
    """Objective [B], gradient P x [B], the matrices to step with and the one to damp with.

    A matrix is {(i, j): [B]} with i <= j.
    """
    log_values, weights = (x.T for x in data)
    x = [row[:, None] for row in inputs]
    y, slopes = law.function(jnp, [c[None] for c in p], x)
    if law.curvature is None:
        raise ValueError(f"{law.name} has no second derivatives; it is for least squares")
    bends = law.curvature(jnp, [c[None] for c in p], x)
    residual = jnp.log(y) - log_values
    size = jnp.abs(residual)
    inside = size < delta
    objective = jnp.sum(
        weights * jnp.where(inside, 0.5 * residual**2, delta * (size - 0.5 * delta)), 0
    )
    pull = weights * jnp.where(inside, residual, delta * jnp.sign(residual)) / y
    push = (weights * inside) / y**2 - pull / y
    # Weights of the squares that touch the objective from above.
    plain = weights * jnp.where(inside, 1.0, delta / size) / y**2
    gradient = [jnp.sum(pull * s, 0) for s in slopes]
    hessian, squares = {}, {}
    for i, j in _pairs(len(p)):
        product = slopes[i] * slopes[j]
        bend = push * product
        if (i, j) in bends:
            bend += pull * bends[i, j]
        hessian[i, j] = jnp.sum(bend, 0)
        squares[i, j] = jnp.sum(plain * product, 0)
    return objective, gradient, [squares, hessian], squares


def _squares_model(law: Law, shared, data, delta, p):
    """As `_huber_model`, with the Gauss-Newton matrix for the Hessian."""
    del delta
    inputs, values, groups = shared
    (group_weights,) = data
    count = len(p)
    y, slopes = law.function(jnp, [c[:, None] for c in p], [inputs[0][None]])
    rows = [*(jnp.broadcast_to(s, y.shape) for s in slopes), y - values[None]]
    j_BMR = jnp.stack(rows, -1)
    weighted_BMR = j_BMR * group_weights[:, groups][..., None]
    gram = jnp.einsum("bmi,bmj->ijb", weighted_BMR, j_BMR)
    gradient = [2 * gram[i, count] for i in range(count)]
    hessian = {(i, j): 2 * gram[i, j] for i, j in _pairs(count)}
    return gram[count, count], gradient, [hessian], hessian


def _step(p, gradient, matrix, metric, blocks, damping, lower, upper):
    """Where a damped Newton step leads inside the box, and whether the system was definite."""
    largest = functools.reduce(jnp.maximum, [metric[i, i] for i in range(len(p))])
    damped = dict(matrix)
    for i, j in matrix:
        if i == j:
            # The ridge keeps a parameter in place that the data say nothing about.
            ridge = 1e-9 * metric[i, i] + 1e-13 * largest + 1e-30
            damped[i, j] = matrix[i, j] + damping * (metric[i, j] + ridge) + ridge
        elif (i, j) in blocks:
            damped[i, j] = matrix[i, j] + damping * metric[i, j]
    matrix = damped
    low = [c <= bound for c, bound in zip(p, lower, strict=True)]
    high = [c >= bound for c, bound in zip(p, upper, strict=True)]
    held = [
        (at_low & (g > 0)) | (at_high & (g < 0))
        for at_low, at_high, g in zip(low, high, gradient, strict=True)
    ]
    step, definite = _solve_free(matrix, gradient, held)
    # A parameter at its bound may be pushed out by its neighbours although its own slope points
    # inwards: hold it as well and solve once more.
    held = [
        h | (at_low & (s < 0)) | (at_high & (s > 0))
        for h, at_low, at_high, s in zip(held, low, high, step, strict=True)
    ]
    step, still_definite = _solve_free(matrix, gradient, held)
    moved = [
        jnp.clip(c + s, low, high) for c, s, low, high in zip(p, step, lower, upper, strict=True)
    ]
    return moved, definite & still_definite


def _solve_free(matrix, gradient, held) -> tuple[list[Any], Any]:
    """Solves matrix x = -gradient by Cholesky with x = 0 where held."""
    n = len(gradient)
    diagonal = [jnp.where(held[i], 1.0, matrix[i, i]) for i in range(n)]
    # Unit diagonal first: the parameters' scales differ by many orders of magnitude.
    scale = [jax.lax.rsqrt(jnp.maximum(d, 1e-300)) for d in diagonal]
    definite = functools.reduce(jnp.logical_and, [d > 0 for d in diagonal])
    low: list[list[Any]] = [[None] * n for _ in range(n)]
    for j in range(n):
        pivot = diagonal[j] * scale[j] ** 2
        for k in range(j):
            pivot -= low[j][k] ** 2
        definite &= pivot > 1e-15
        root = jnp.sqrt(jnp.maximum(pivot, 1e-15))
        low[j][j] = root
        for i in range(j + 1, n):
            entry = jnp.where(held[i] | held[j], 0.0, matrix[j, i] * scale[i] * scale[j])
            for k in range(j):
                entry -= low[i][k] * low[j][k]
            low[i][j] = entry / root
    y: list[Any] = []
    for i in range(n):
        entry = jnp.where(held[i], 0.0, -gradient[i] * scale[i])
        for k in range(i):
            entry -= low[i][k] * y[k]
        y.append(entry / low[i][i])
    x: list[Any] = [None] * n
    for i in reversed(range(n)):
        entry = y[i]
        for k in range(i + 1, n):
            entry -= low[k][i] * x[k]
        x[i] = entry / low[i][i]
    return [x[i] * scale[i] for i in range(n)], definite


def shared_starts(law: Law, extra: Sequence[Sequence[float] | np.ndarray] = ()) -> np.ndarray:
    """float64 [S, P]: the published start, `extra` ones and a small spread over the plausible."""
    grids: dict[str, list[tuple[float, ...]]] = {
        "power_nd": [
            (3.0, 6.0, 0.1, 0.2, 1.0),
            (4.0, 4.5, 0.25, 0.25, 0.5),
            (10.0, 4.0, 0.6, 0.2, 0.6),
            (4.0, 10.0, 0.25, 0.5, 0.8),
            (8.0, 8.0, 0.45, 0.4, 0.9),
            (2.0, 2.5, 0.15, 0.1, 0.01),
            (14.0, 3.0, 0.8, 0.15, 0.3),
            (6.0, 1.5, 0.35, 0.05, 0.01),
        ],
    }
    rows = [law.start, *extra, *grids.get(law.name, [])[1:]]
    return np.asarray(rows, np.float64)


def second_starts(law: Law, x: np.ndarray, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    """float64 [S, P] for the second step: the published start, a known fit and, for a sigmoid,
    falls from near 1 to the lowest accuracy seen, at three places and two speeds.
    """
    rows = [np.asarray(law.start), np.asarray(known)]
    if law.name == "sigmoid":
        # The helper point at loss 0 is not a place where models are.
        seen = x[x > 0]
        low, middle, high = np.quantile(seen, [0.1, 0.5, 0.9])
        floor = float(np.clip(y[x > 0].min(), 0.0, 0.99))
        for place in (low, middle, high):
            for speed in (2.0, 8.0):
                rows.append(np.array([floor - 1.0, place, speed / max(high - low, 1e-6), 1.0]))
    return np.array(rows)
