"""Attention of one new token a sequence over keys and values that lie in pages."""

from kernels_pallas.paged_attention.api import IMPLEMENTATIONS, choose, paged_attention

__all__ = ["IMPLEMENTATIONS", "choose", "paged_attention"]
