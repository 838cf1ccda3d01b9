"""Definitions of the routing analysis, on arrays of expert ids (specs/olmoe.md section 4).

Everything is in percent. T tokens, k experts of a token (the most likely first), E experts.
"""

import dataclasses
from typing import Literal

import numpy as np


def expert_counts(experts_Tk: np.ndarray, n_experts: int) -> np.ndarray:
    """(token, slot) pairs of each expert, int64 [E]."""
    return np.bincount(experts_Tk.reshape(-1), minlength=n_experts)


def saturation(early_Tk: np.ndarray, late_Tk: np.ndarray, k: int | None = None) -> float:
    """Share of the k most likely experts of the later checkpoint that the earlier one chose too,
    mean over tokens.

    Random routers give 100 k / E.

    Args:
      early_Tk: experts that the earlier checkpoint sends each token to.
      late_Tk: the same of the later one, for the same tokens.
      k: of the most likely experts; all when None.
    """
    early, late = early_Tk[:, :k], late_Tk[:, :k]
    if early.shape != late.shape:
        raise ValueError(f"saturation compares the same tokens, got {early.shape}, {late.shape}")
    common = (early[:, :, None] == late[:, None, :]).any(axis=2)
    return 100 * float(common.mean())


def coactivation(
    experts_Tk: np.ndarray, n_experts: int, *, pairs: Literal["all", "adjacent"] = "all"
) -> np.ndarray:
    """Of the tokens sent to expert a, the share also sent to expert b: [a, b], zero on the
    diagonal. Not symmetric.

    `all` is the paper's definition. `adjacent` is what the published heat maps show: only experts
    next to each other in a token's ranking count as a pair, so it is at most as large.
    """
    k = experts_Tk.shape[1]
    together = np.zeros((n_experts, n_experts), np.int64)
    for i in range(k):
        for j in range(i + 1, min(i + 2, k) if pairs == "adjacent" else k):
            np.add.at(together, (experts_Tk[:, i], experts_Tk[:, j]), 1)
    together += together.T
    alone = expert_counts(experts_Tk, n_experts)
    return 100 * together / np.maximum(alone, 1)[:, None]


def busiest_pairs(coactivation_EE: np.ndarray, count: int = 16) -> list[int]:
    """The first `count` experts that appear when pairs are sorted by co-activation: rows and
    columns of the published heat maps.
    """
    order = np.argsort(-coactivation_EE, axis=None, kind="stable")
    found: dict[int, None] = {}
    for a, b in zip(*np.unravel_index(order, coactivation_EE.shape), strict=True):
        found |= {int(a): None, int(b): None}
        if len(found) >= count:
            break
    return list(found)[:count]


def domain_specialization(counts_E: np.ndarray, k: int) -> np.ndarray:
    """Share of a domain's tokens that each expert gets, of its (token, slot) pairs `counts_E`.

    Uniform is 100 k / E; the sum over experts is 100 k.
    """
    return 100 * k * np.asarray(counts_E, np.float64) / np.sum(counts_E)


def expert_load(counts_E: np.ndarray) -> np.ndarray:
    """Load of each expert in percent of an equal share (100: balance, 0: dead)."""
    counts = np.asarray(counts_E, np.float64)
    return 100 * counts / counts.mean()


@dataclasses.dataclass(frozen=True)
class VocabularySpecialization:
    """How far token ids keep to one expert each."""

    mean: float
    """Mean over distinct ids of the share of an id's occurrences that its favourite expert gets.
    Ids seen once count 100, so small samples inflate it."""
    by_expert: np.ndarray
    """[E]: the same over the ids whose favourite the expert is; NaN where it is nobody's."""
    favourites: dict[int, list[tuple[int, float, int]]]
    """By expert (id, share, occurrences), the highest share first, of ids seen often enough."""


def vocabulary_specialization(
    experts_Tk: np.ndarray,
    ids_T: np.ndarray,
    n_experts: int,
    *,
    k: int = 1,
    least: int = 10,
) -> VocabularySpecialization:
    """Specialisation on the ids `ids_T`: the tokens read, those that follow, or the predicted ones.

    The favourite of an id is the expert that most often is among its k most likely (the lowest
    numbered of equal ones).

    Args:
      experts_Tk: experts of each token.
      ids_T: id of each token; negative ones are left out (a last token has no next one).
      n_experts: E.
      k: how many of a token's experts count; the paper's main figure has 1.
      least: occurrences from which an id is listed in `favourites`.
    """
    known = ids_T >= 0
    ids, index, occurrences = np.unique(ids_T[known], return_inverse=True, return_counts=True)
    counts = np.zeros((len(ids), n_experts), np.int64)
    for slot in range(k):
        np.add.at(counts, (index, experts_Tk[known, slot]), 1)
    favourite = counts.argmax(axis=1)
    share = 100 * counts.max(axis=1) / occurrences
    by_expert = np.full(n_experts, np.nan)
    favourites: dict[int, list[tuple[int, float, int]]] = {}
    for expert in np.unique(favourite):
        mine = np.flatnonzero(favourite == expert)
        by_expert[expert] = share[mine].mean()
        often = mine[occurrences[mine] >= least]
        often = often[np.argsort(-share[often], kind="stable")]
        favourites[int(expert)] = [
            (int(ids[i]), float(share[i]), int(occurrences[i])) for i in often
        ]
    return VocabularySpecialization(float(share.mean()), by_expert, favourites)
