"""Model soups: the (weighted) mean of the parameters, accumulated in float32.

OLMo 2's final base models are unweighted soups of annealing runs that differ in data order (paper
section 4.5, specs/olmo2.md section 5).
"""

import math
import os
from collections.abc import Sequence

import numpy as np

from olmax.errors import UserError
from olmax.merging.merge import Method, merge


def soup(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    **kwargs,
) -> None:
    """Writes the mean of several models of one architecture as a Hugging Face directory.

    Args:
      paths: at least two model paths of any kind.
      output: the directory to create.
      weights: one non-negative number a model; they are divided by their sum. None: equal.
      dtype: of the output; None keeps the ingredients' where all are stored in the same one, else
        float32.
      **kwargs: further arguments of `merging.merge`.

    Raises:
      UserError: as `merging.merge`; or weights that do not fit.
    """
    if weights is not None and len(weights) != len(paths):
        raise UserError(
            f"{len(weights)} weights for {len(paths)} models; give one a model, or none"
        )
    merge(
        paths,
        output,
        weighted_mean([1.0] * len(paths) if weights is None else weights),
        dtype=dtype,
        **kwargs,
    )


def weighted_mean(weights: Sequence[float]) -> Method:
    """The method of a soup; weights are divided by their sum.

    Computed as first + sum of weight * (value - first), which leaves what all ingredients share
    exactly as it is.

    Raises:
      UserError: a negative or infinite weight, or all zero.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights) > 0:
        raise UserError(f"soup weights must be non-negative and not all zero, are {list(weights)}")
    shares = [weight / sum(weights) for weight in weights]

    def mean(name: str, values: Sequence[np.ndarray]) -> np.ndarray:
        del name
        out = values[0].copy()
        for share, value in zip(shares[1:], values[1:], strict=True):
            out += np.float32(share) * (value - values[0])
        return out

    return mean
