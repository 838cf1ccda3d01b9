"""Scaled dot-product attention with causal and segment masks and grouped heads."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, attention

__all__ = ["IMPLEMENTATIONS", "attention"]
