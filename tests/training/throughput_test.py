"""MFU against published logs."""

from types import SimpleNamespace

import pytest

from olmax.models import get_preset
from olmax.training.throughput import mfu, peak_flops


def device(kind):
    return SimpleNamespace(device_kind=kind)


def test_a_published_log_line():
    """MaxText's worked example: deepseek2-16b on v5p, 764.67 TFLOP a step and device, 5.667 s."""
    used = mfu(764.67e12, 5.667, peak_flops(device("TPU v5p")))
    assert used == pytest.approx(0.294, abs=5e-4)


def test_a_published_throughput():
    """Llama 3.1 8B on v6e, length 8192: 7,207 tok/s a device are given as 45.46%; the row fits only
    the count of whole attention matrices, not halved for causality.
    """
    flops = get_preset("llama3.1-8b").matmul_flops_per_token(8192, causal=False)
    assert mfu(flops * 7207, 1.0, peak_flops(device("TPU v6e"))) == pytest.approx(0.4546, abs=2e-3)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(device(kind)) == peak
