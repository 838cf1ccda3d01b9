"""Scaled dot-product attention with causal and segment masks and grouped heads."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, PER_DEVICE, attention, choose

__all__ = ["IMPLEMENTATIONS", "PER_DEVICE", "attention", "choose"]
