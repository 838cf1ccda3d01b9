"""Plans of programs that the compiler refuses."""

import dataclasses
import importlib.util

import pytest

from olmax.models.presets import get_preset
from olmax.planning.plan import plan
from olmax.planning.topology import Topology


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'olmax[tpu]')",
)
@pytest.mark.parametrize("quick", [False, True])
def test_what_the_compiler_refuses_does_not_fit(quick):
    # 2.6 billion embedding parameters on four chips of 16 GB.
    config = dataclasses.replace(get_preset("olmo2-tiny"), n_layers=1, vocab_size=10_000_384)
    found = plan(
        config,
        Topology.parse("v5e:2x2"),
        batch_size=4,
        sequence_length=128,
        mesh="fsdp=4",
        quick=quick,
    )
    assert not found.fits
    assert found.per_device_bytes.total > found.hbm_bytes
    assert found.verdict.startswith("does not fit: over by ")
    assert "--topology v5e:" in found.verdict
    assert found.step_seconds is None and found.price is None
