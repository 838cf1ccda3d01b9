"""Tokens per second and model FLOPs utilisation (MFU)."""

from typing import Any

# Dense bfloat16 FLOP/s of one jax device, by the start of its `device_kind`, first match counts.
# Vendors' published peaks; a TPU7x chip (2307e12) shows up as two devices.
_PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 2307e12 / 2),
    ("TPU v7", 2307e12 / 2),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
)


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 FLOP/s of a jax device; None where it is not known (CPUs among them)."""
    for kind, flops in _PEAKS:
        if device.device_kind.startswith(kind):
            return flops
    return None


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Share of the peak that was used, 0..1.

    Args:
      flops: FLOPs the model's mathematics needs (no recomputation), on as many devices as `peak`.
      seconds: the time they took.
      peak: FLOP/s of those devices together.
    """
    return flops / seconds / peak
