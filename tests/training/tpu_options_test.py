"""Options of the TPU compiler."""

import types

import numpy as np
import pytest

from kernels_pallas import targets
from olmax.training.tpu_options import compiler_options


def mesh(kind):
    return types.SimpleNamespace(devices=np.array([types.SimpleNamespace(device_kind=kind)]))


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("TPU v5 lite", "98304"), ("TPU v5", "49152"), ("TPU v6 lite", "98304"), ("TPU v4", None)],
)
def test_the_limit_is_what_the_vector_memory_of_the_chip_allows(kind, limit):
    with targets.compiling_for("tpu"):
        options = compiler_options(mesh(kind))
    assert options.get("xla_tpu_scoped_vmem_limit_kib") == limit
    assert "xla_jf_spmd_threshold_for_windowed_einsum_mib" in options


def test_other_devices_have_none():
    assert compiler_options(None) is None
