"""Perplexity of texts, and of the batches of a loader."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from olmax.data.tokenizer import train_bpe
from olmax.errors import UserError
from olmax.evaluation.perplexity import batch_losses, perplexity
from olmax.models import Decoder
from olmax.sharding import MeshConfig, init_decoder, make_mesh
from olmax.training.objectives import NextToken

TEXT = "A small town lies between hills, and every morning the bells ring. " * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], vocab_size=300)


def test_sources_are_measured_apart_and_every_byte_counts(model, tokenizer):
    documents = {"town": [TEXT, TEXT[:40]], "café": ["naïve café"]}
    found = perplexity(model, tokenizer, documents)
    assert list(found) == ["town", "café"]
    assert found["café"].bytes == 12 and found["café"].documents == 1
    assert found["town"].tokens == sum(len(tokenizer.encode(t)) for t in documents["town"])
    bits = found["town"].bits_per_byte.value
    nats = bits * found["town"].bytes * math.log(2)
    assert found["town"].nats_per_token.value == pytest.approx(nats / found["town"].tokens)
    assert found["town"].perplexity == pytest.approx(math.exp(nats / found["town"].tokens))


def test_a_short_document_follows_the_end_of_text(model, tokenizer):
    ids = [tokenizer.eos_id, *tokenizer.encode(TEXT[:40])]
    logprobs = jax.nn.log_softmax(
        nnx.jit(Decoder.__call__)(model, np.array([ids[:-1]]))[0], axis=-1
    )
    nats = -float(logprobs[np.arange(len(ids) - 1), np.array(ids[1:])].sum())
    found = perplexity(model, tokenizer, {"a": [TEXT[:40]]})["a"]
    assert found.bits_per_byte.value == pytest.approx(nats / 40 / math.log(2), rel=1e-5)


def test_a_smaller_stride_counts_the_same_tokens_with_more_context(model, tokenizer):
    pieces = perplexity(model, tokenizer, {"a": [TEXT]})["a"]
    strided = perplexity(model, tokenizer, {"a": [TEXT]}, stride=8)["a"]
    assert pieces.tokens == strided.tokens > model.config.max_seq_len
    assert pieces.bits_per_byte.value != strided.bits_per_byte.value


def test_a_source_without_text_is_named(model, tokenizer):
    with pytest.raises(UserError, match="source 'b' holds no text"):
        perplexity(model, tokenizer, {"a": ["x"], "b": [""]})


def batches():
    rng = np.random.default_rng(0)
    for _ in range(2):
        mask = rng.random((4, 32)) < 0.8
        yield {
            "tokens": rng.integers(0, 300, (4, 32), np.int32),
            "loss_mask": mask,
            "source": np.array([0, 1, 0, 1], np.int32),
        }


def test_batches_of_a_loader_give_the_training_loss_by_source(model):
    found = batch_losses(model, batches(), ["a", "b"])
    objective = nnx.jit(lambda model, part: NextToken(z_loss=0.0)(model, part, jax.random.key(0)))
    total = weight = 0.0
    for batch in batches():
        part = {key: value[[0, 2]] for key, value in batch.items()}
        mean, _ = objective(model, part)
        total, weight = total + float(mean.total), weight + float(mean.weight)
    assert found["a"].value == pytest.approx(total / weight, rel=1e-5)
    assert found["a"].n == 4 and found["a"].stderr > 0
    assert found["b"].value != found["a"].value
    with pytest.raises(UserError, match="which source"):
        batch_losses(model, [{"tokens": np.zeros((1, 4), np.int32)}], ["a", "b"])


def test_batches_on_a_mesh(model):
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    sharded = batch_losses(init_decoder(model.config, seed=0, mesh=mesh), batches(), ["a", "b"])
    plain = batch_losses(model, batches(), ["a", "b"])
    for name in ("a", "b"):
        assert sharded[name].value == pytest.approx(plain[name].value, rel=1e-5)
