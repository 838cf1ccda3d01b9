"""The released ladder, read once."""

import pathlib

import pytest

from olmax import scaling

FITTED = [f"{size}-{k}xC.csv" for size in ("190M", "370M", "760M", "1B") for k in (1, 2, 5, 10)]
TARGETS = ["peteish7_eval_anneal.csv", "peteish13_eval_final.csv"]


@pytest.fixture(scope="session")
def released(data_dir) -> pathlib.Path:
    """Folder of the released data."""
    folder = data_dir / "ladder" / "raw"
    if not folder.is_dir():
        pytest.skip(f"no released ladder runs at {folder}")
    return folder


@pytest.fixture(scope="session")
def runs(released):
    """The sixteen runs of the paper's fit."""
    return scaling.read_runs([released / "ladder-runs" / name for name in FITTED])


@pytest.fixture(scope="session")
def target_runs(released):
    """7B-4T and 13B-5T."""
    return scaling.read_runs([released / "ladder-runs" / name for name in TARGETS])


@pytest.fixture(scope="session")
def fit(runs):
    """The published fit of the paper's eight tasks."""
    return scaling.fit_ladder(runs, check=False)
