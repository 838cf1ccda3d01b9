"""Compute-optimal sizes: Chinchilla's approach 2 (IsoFLOP parabolas) and approach 3 (a surface)."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from olmax.errors import UserError
from olmax.scaling.laws import POWER_ND, Law
from olmax.scaling.reference import HUBER_DELTA


@dataclasses.dataclass(frozen=True)
class Surface:
    """L(N, D) = A / N^alpha + B / D^beta + E, and what it says about spending C = 6 N D."""

    parameters: dict[str, float]
    """log_A, log_B, alpha, beta, E."""
    objective: float
    points: int
    converged: bool

    @property
    def vector(self) -> np.ndarray:
        """float64 [5]."""
        return np.array([self.parameters[name] for name in POWER_ND.parameters])

    def loss(self, n, d) -> np.ndarray:
        """Loss at N parameters and D tokens."""
        return POWER_ND(self.vector, n, d)

    def optimum(self, compute: float) -> tuple[float, float]:
        """(N, D) with the lowest loss among 6 N D = `compute`.

        N = G (C / 6)^(beta / (alpha + beta)) with G = (alpha A / (beta B))^(1 / (alpha + beta)).
        """
        p = self.parameters
        total = p["alpha"] + p["beta"]
        log_g = (np.log(p["alpha"] / p["beta"]) + p["log_A"] - p["log_B"]) / total
        n = float(np.exp(log_g + p["beta"] / total * np.log(compute / 6)))
        return n, compute / 6 / n

    def cheapest(
        self, loss: float, *, log10_range: tuple[float, float] = (12, 40)
    ) -> tuple[float, float]:
        """(N, D) of the least 6 N D that reaches a loss.

        Raises:
          UserError: the loss lies below what the surface can reach.
        """
        low, high = log10_range
        if self.loss(*self.optimum(10**high)) > loss:
            raise UserError(
                f"loss {loss:.4g} is out of reach: the fitted surface ends at E = "
                f"{self.parameters['E']:.4g}"
            )
        for _ in range(200):
            middle = (low + high) / 2
            if self.loss(*self.optimum(10**middle)) > loss:
                low = middle
            else:
                high = middle
        return self.optimum(10**high)


def start_grid() -> np.ndarray:
    """float64 [S, 5]: the published grid of starts over (log A, log B, alpha, beta, log E)."""
    grid = itertools.product(
        (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
        (0.0, 0.5, 1.0, 1.5, 2.0),
        (0.0, 0.5, 1.0, 1.5, 2.0),
        np.exp([-1.0, -0.5, 0.0, 0.5, 1.0]),
    )
    return np.array(list(grid))


def fit_surface(
    n: Sequence[float],
    d: Sequence[float],
    loss: Sequence[float],
    *,
    weights: Sequence[float] | None = None,
    delta: float = HUBER_DELTA,
    law: Law = POWER_ND,
    starts: int = 200,
) -> Surface:
    """Approach 3: the sum of Huber losses of log residuals, minimised from many starts.

    The published grid has 4,500 starts, most of them absurd; those `starts` with the lowest
    objective, and the law's own, are followed.

    Args:
      n: parameters of each run.
      d: tokens of each run.
      loss: final loss of each run.
      weights: of each run.
      delta: of the Huber loss.
      law: POWER_ND, perhaps with other bounds.
      starts: how many to follow.

    Raises:
      UserError: fewer than five runs.
    """
    from olmax.scaling import batched

    inputs = np.array([n, d], np.float64)
    values = np.asarray(loss, np.float64)
    if len(values) < 5:
        raise UserError(f"{len(values)} runs cannot determine the 5 parameters of L(N, D)")
    w = np.ones((1, len(values))) if weights is None else np.asarray(weights, float)[None]
    grid = start_grid()
    scores = batched.huber_objectives(law, inputs, values, w, grid, delta)[0]
    chosen = np.concatenate([batched.shared_starts(law), grid[np.argsort(scores)[:starts]]])
    found = batched.solve_huber(law, inputs, values, w, chosen, delta=delta)
    return Surface(
        dict(zip(law.parameters, map(float, found.parameters[0]), strict=True)),
        float(found.objective[0]),
        len(values),
        bool(found.converged[0]),
    )


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """Approach 2: the best size at each budget, and a power law through those."""

    budgets: np.ndarray
    """float64 [K]: FLOPs."""
    best_n: np.ndarray
    """float64 [K]: parameters at the vertex of each budget's parabola."""
    best_loss: np.ndarray
    """float64 [K]."""
    exponent: float
    """a of N = k C^a."""
    log_factor: float
    """ln k."""
    at_edge: tuple[float, ...]
    """Budgets whose vertex lies outside the sizes that were trained: not to be trusted."""

    def optimum(self, compute: float) -> tuple[float, float]:
        """(N, D) at a budget, with D = C / 6 N."""
        n = float(np.exp(self.log_factor + self.exponent * np.log(compute)))
        return n, compute / 6 / n


def fit_isoflop(
    compute: Sequence[float],
    n: Sequence[float],
    loss: Sequence[float],
    *,
    tolerance: float = 0.1,
) -> IsoFlop:
    """A parabola of loss over ln N at every budget, then ln N = ln k + a ln C through the vertices.

    The parabola's vertex is biased where loss is not symmetric in ln N, even without noise; prefer
    `fit_surface` when runs are not on common budgets.

    Args:
      compute: FLOPs of each run.
      n: parameters of each run.
      loss: final loss of each run.
      tolerance: runs whose FLOPs differ by less than this share are of one budget.

    Raises:
      UserError: no two budgets with three sizes and a minimum.
    """
    log_c, log_n = np.log(np.asarray(compute, float)), np.log(np.asarray(n, float))
    losses = np.asarray(loss, np.float64)
    order = np.argsort(log_c)
    breaks = np.flatnonzero(np.diff(log_c[order]) > np.log1p(tolerance)) + 1
    budgets, vertices, lowest, edge = [], [], [], []
    for group in np.split(order, breaks):
        if len(np.unique(log_n[group])) < 3:
            continue
        centre = log_n[group].mean()
        a, b, c = np.polyfit(log_n[group] - centre, losses[group], 2)
        if a <= 0:
            continue
        vertex = centre - b / (2 * a)
        budget = float(np.exp(log_c[group].mean()))
        if not log_n[group].min() <= vertex <= log_n[group].max():
            edge.append(budget)
        budgets.append(budget)
        vertices.append(vertex)
        lowest.append(c - b * b / (4 * a))
    if len(budgets) < 2:
        raise UserError(
            f"IsoFLOP needs two budgets with 3 sizes or more and a minimum; found {len(budgets)}"
        )
    exponent, factor = np.polyfit(np.log(budgets), vertices, 1)
    return IsoFlop(
        np.array(budgets),
        np.exp(vertices),
        np.array(lowest),
        float(exponent),
        float(factor),
        tuple(edge),
    )
