"""Loaded checkpoints compute what transformers computes (golden files: make_golden.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmax.interop import load_model
from tests.interop import golden_models

LENGTH = 96


@pytest.fixture(scope="module", params=golden_models.CASES)
def case(request, checkpoints):
    """(compiled logits function [LENGTH] -> [LENGTH, V], golden arrays) of each case."""
    model = load_model(checkpoints[request.param])
    forward = jax.jit(lambda tokens_BL: model(tokens_BL))

    def logits(ids):
        # Causal: what stands behind a token does not change its logits, so one length is enough.
        padded = np.zeros(LENGTH, np.int32)
        padded[: len(ids)] = ids
        return np.asarray(forward(padded[None])[0])

    golden = np.load(pathlib.Path(__file__).parent / "golden" / f"{request.param}.npz")
    return logits, golden


def unpadded(rows):
    return [row[row >= 0].tolist() for row in rows]


def test_logits(case):
    logits, golden = case
    for tokens, expected in zip(golden["tokens"], golden["logits"], strict=True):
        got = logits(tokens)[golden["positions"]]
        assert np.abs(expected).max() > 5  # large enough for the tolerance to mean something
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4)


def test_log_likelihoods(case):
    logits, golden = case
    pairs = zip(unpadded(golden["contexts"]), unpadded(golden["continuations"]), strict=True)
    for i, (context, continuation) in enumerate(pairs):
        steps = logits(context + continuation)[len(context) - 1 : -1][: len(continuation)]
        logprobs = jax.nn.log_softmax(jnp.asarray(steps), axis=-1)
        total = float(logprobs[np.arange(len(continuation)), np.array(continuation)].sum())
        np.testing.assert_allclose(total, golden["logprobs"][i], rtol=1e-4)
        assert (steps.argmax(-1) == continuation).all() == golden["is_greedy"][i]
    assert set(golden["is_greedy"]) == {True, False}


def test_greedy_generation(case):
    logits, golden = case
    for prompt, expected in zip(unpadded(golden["prompts"]), golden["generations"], strict=True):
        ids = list(prompt)
        for _ in expected:
            ids.append(int(logits(ids)[len(ids) - 1].argmax()))
        assert ids[len(prompt) :] == expected.tolist()
