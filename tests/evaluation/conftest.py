"""One small model for all tests of this folder, so that its shapes are compiled once."""

import dataclasses

import pytest
from flax import nnx

from olmax.models import Decoder, get_preset


@pytest.fixture(scope="session")
def model() -> Decoder:
    """A random decoder of 2 layers, 320 tokens and a context of 48."""
    config = dataclasses.replace(
        get_preset("olmo2-tiny-gqa"), n_layers=2, d_model=64, d_ff=128, vocab_size=320,
        max_seq_len=48,
    )  # fmt: skip
    return nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
