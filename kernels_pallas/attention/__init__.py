"""Scaled dot-product attention with causal, window, segment and other masks and grouped heads."""

from kernels_pallas.attention.api import IMPLEMENTATIONS, PER_DEVICE, attention, choose
from kernels_pallas.attention.ring import ring_attention

__all__ = ["IMPLEMENTATIONS", "PER_DEVICE", "attention", "choose", "ring_attention"]
