"""Merging checkpoints tensor by tensor: soups, and the engine for other methods."""

from olmax.merging.merge import Method, merge
from olmax.merging.soup import soup, weighted_mean

__all__ = ["Method", "merge", "soup", "weighted_mean"]
