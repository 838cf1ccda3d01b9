"""Options of the TPU compiler."""

import types

import numpy as np
import pytest

from kernels_pallas import targets
from olmax.training.tpu_options import compiler_options


def mesh(kind):
    axes = {"slice": 1, "data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "context": 2}
    devices = np.array([types.SimpleNamespace(device_kind=kind)] * 16)
    return types.SimpleNamespace(devices=devices, shape=axes)


@pytest.mark.parametrize(
    ("kind", "few", "many"),
    [
        ("TPU v5 lite", "32768", "49152"),
        ("TPU v5", "49152", "49152"),
        ("TPU v6 lite", "49152", "98304"),
        ("TPU v4", None, None),
    ],
)
def test_the_limit_goes_by_the_chip_and_the_tokens_of_a_device(kind, few, many):
    with targets.compiling_for("tpu"):
        # Four batch shards times two pieces of a sequence.
        options = compiler_options(mesh(kind), 8 * 4096)
        more = compiler_options(mesh(kind), 8 * 4096 + 8)
    assert options is not None and more is not None
    assert options.get("xla_tpu_scoped_vmem_limit_kib") == few
    assert more.get("xla_tpu_scoped_vmem_limit_kib") == many
    assert "xla_jf_spmd_threshold_for_windowed_einsum_mib" in options


def test_other_devices_have_none():
    assert compiler_options(None, 4096) is None
