"""The error a plan states."""

import math

import pytest

from olmax.models.presets import PRESETS
from olmax.planning import calibration
from olmax.planning.topology import Topology


def test_published_rows_name_models_and_slices_that_exist():
    for row in calibration.PUBLISHED:
        assert row.model in PRESETS
        assert Topology.parse(row.topology).num_chips >= 256
        assert 0 < row.mfu < 1


def test_the_error_is_the_root_mean_square_over_the_rows(monkeypatch):
    rows = [dict(published_mfu=0.5, planned_mfu=0.4), dict(published_mfu=0.4, planned_mfu=0.44)]
    monkeypatch.setattr(calibration, "measured", lambda: rows)
    assert calibration.relative_error() == pytest.approx(math.sqrt((0.2**2 + 0.1**2) / 2))


def test_without_rows_the_error_is_unknown(monkeypatch):
    monkeypatch.setattr(calibration, "measured", lambda: [])
    assert calibration.relative_error() is None
