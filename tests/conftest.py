"""Shared set-up: eight faked CPU devices, and where data that may not be shipped is found."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

import olmax.scaling.portable  # noqa: F401  before anything loads scipy's BLAS
from olmax import absent_tpu

# Tests compile for TPUs that are not there.
if not absent_tpu.attached():
    absent_tpu.announce()

# Not through XLA_FLAGS: processes that tests start would inherit it.
jax.config.update("jax_num_cpu_devices", 8)

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Directory of real data for checking; tests that need it skip where it is absent."""
    path = pathlib.Path(os.environ.get("OLMAX_DATA_DIR", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data directory at {path}; set OLMAX_DATA_DIR")
    return path


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """Root of the repository."""
    return REPOSITORY
