"""Checkpoints that the interop tests share."""

import pathlib

import pytest

from tests.interop import golden_models


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The golden cases as Hugging Face directories. Do not write into them."""
    root = tmp_path_factory.mktemp("golden")
    return {name: golden_models.write_checkpoint(name, root / name) for name in golden_models.CASES}
