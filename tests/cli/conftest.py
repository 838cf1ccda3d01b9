"""A model with a tokenizer, as a directory."""

import pathlib

import pytest

from olmax.data.tokenizer import train_bpe
from tests.interop import golden_models


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> pathlib.Path:
    """A small Hugging Face directory. Do not write into it."""
    path = golden_models.write_checkpoint("olmo2_mha", tmp_path_factory.mktemp("cli") / "model")
    train_bpe(["the cat sat on the mat. " * 9], vocab_size=300).save(path)
    return path
