"""The whole routing analysis of a model as plain numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from olmax.errors import UserError
from olmax.routing.routes import Routes
from olmax.routing.statistics import (
    busiest_pairs,
    coactivation,
    domain_specialization,
    expert_counts,
    expert_load,
    saturation,
    vocabulary_specialization,
)

IDS = {"input": "tokens_T", "predicted": "predicted_T", "ground_truth": "next_T"}
"""Token ids that vocabulary specialisation is taken on, and where `Routes` has them."""


def analyse(
    routes: Routes,
    *,
    layers: Sequence[int] | None = None,
    earlier: Mapping[str, Routes] | None = None,
) -> dict[str, Any]:
    """Everything of specs/olmoe.md section 4 that can be said of a model, JSON-able, in percent.

    Args:
      routes: of the model (for saturation: the final one).
      layers: in full detail; None: first, middle and last.
      earlier: routes of earlier checkpoints over the same windows, by name, for saturation.

    Raises:
      UserError: a layer that is not there, or a checkpoint with other tokens or experts.
    """
    count, tokens, k = routes.experts_NTk.shape
    layers = sorted({0, count // 2 - 1, count - 1} - {-1}) if layers is None else layers
    for layer in layers:
        if not 0 <= layer < count:
            raise UserError(f"routing: no layer {layer}; the model has 0 to {count - 1}")
    for name, early in (earlier or {}).items():
        same = early.experts_NTk.shape == routes.experts_NTk.shape
        if not same or early.n_experts != routes.n_experts:
            raise UserError(f"routing: {name} has other layers or experts than the model")
    return {
        "n_experts": routes.n_experts,
        "experts_per_token": k,
        "tokens": tokens,
        "tokens_by_domain": {
            name: int(np.sum(routes.domain_T == i)) for i, name in enumerate(routes.domains)
        },
        "layers": list(layers),
        "load": [_load(routes.of(layer), routes.n_experts) for layer in range(count)],
        "saturation": {
            name: {
                "1": [_saturation(early, routes, layer, 1) for layer in range(count)],
                "k": [_saturation(early, routes, layer, None) for layer in range(count)],
            }
            for name, early in (earlier or {}).items()
        },
        "coactivation": {
            str(layer): {
                pairs: _coactivation(routes.of(layer), routes.n_experts, pairs)
                for pairs in ("all", "adjacent")
            }
            for layer in layers
        },
        "domain_specialization": {
            str(layer): {
                domain: domain_specialization(
                    expert_counts(routes.of(layer, domain), routes.n_experts), k
                ).tolist()
                for domain in routes.domains
            }
            for layer in layers
        },
        "vocabulary_specialization": {
            f"{ids} top-{top}": [
                vocabulary_specialization(
                    routes.of(layer), getattr(routes, field), routes.n_experts, k=top
                ).mean
                for layer in range(count)
            ]
            for top in sorted({1, k})
            for ids, field in IDS.items()
        },
        "vocabulary": {str(layer): _vocabulary(routes, layer) for layer in layers},
    }


def _load(experts_Tk: np.ndarray, n_experts: int) -> dict[str, Any]:
    load_E = expert_load(expert_counts(experts_Tk, n_experts))
    return {
        "percent": load_E.tolist(),
        "max": float(load_E.max()),
        "min": float(load_E.min()),
        "dead": int(np.sum(load_E == 0)),
    }


def _saturation(early: Routes, late: Routes, layer: int, k: int | None) -> float:
    return saturation(early.of(layer), late.of(layer), k)


def _coactivation(experts_Tk: np.ndarray, n_experts: int, pairs: Any) -> dict[str, Any]:
    matrix_EE = coactivation(experts_Tk, n_experts, pairs=pairs)
    shown = busiest_pairs(matrix_EE)
    cells = matrix_EE[np.ix_(shown, shown)]
    off_diagonal = cells[~np.eye(len(shown), dtype=bool)]
    return {
        "experts": shown,
        "percent": cells.tolist(),
        "max": float(off_diagonal.max()) if len(shown) > 1 else 0.0,
        "mean": float(off_diagonal.mean()) if len(shown) > 1 else 0.0,
    }


def _vocabulary(routes: Routes, layer: int) -> dict[str, Any]:
    """Favourite input ids of the most specialised experts."""
    found = vocabulary_specialization(routes.of(layer), routes.tokens_T, routes.n_experts)
    ranked = sorted(
        (e for e, ids in found.favourites.items() if ids), key=lambda e: -found.by_expert[e]
    )
    return {
        str(e): {"percent": float(found.by_expert[e]), "ids": found.favourites[e][:12]}
        for e in ranked[:8]
    }


def domain_summary(counts_E: Sequence[int] | np.ndarray, k: int) -> dict[str, Any]:
    """What the paper's tables say of one layer and domain: the highest specialisation and its
    expert, the standard deviation over experts, and how many lie above twice the uniform share.
    """
    percent_E = domain_specialization(np.asarray(counts_E), k)
    return {
        "max": float(percent_E.max()),
        "expert": int(percent_E.argmax()),
        "std": float(percent_E.std()),
        "above_twice_uniform": int(np.sum(percent_E > 2 * 100 * k / len(percent_E))),
    }
