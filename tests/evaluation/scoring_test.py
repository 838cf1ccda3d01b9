"""Log-likelihoods against the definition, whatever is beside a pair in its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.evaluation.scoring import Score, score, windows
from olmax.sharding import MeshConfig, init_decoder, make_mesh

VOCAB, CONTEXT = 320, 48


def ids(rng, length):
    return rng.integers(0, VOCAB, length).tolist()


def some_pairs(count=12, seed=0):
    rng = np.random.default_rng(seed)
    return [(ids(rng, rng.integers(1, 40)), ids(rng, rng.integers(1, 9))) for _ in range(count)]


def by_definition(model, context, continuation) -> tuple[float, bool]:
    """One row, all logits, the context cut by hand."""
    tokens = np.array((context + continuation)[-(CONTEXT + 1) :])
    # Padded to one length so that it compiles once; causal attention does not look there.
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logits = _forward(*nnx.split(model), padded)[0, : len(tokens) - 1]
    logprobs = jax.nn.log_softmax(logits, axis=-1)[-len(continuation) :]
    chosen = logprobs[np.arange(len(continuation)), np.array(continuation)]
    return float(chosen.sum()), bool((logprobs.argmax(-1) == np.array(continuation)).all())


@jax.jit(static_argnums=0)
def _forward(graphdef, state, tokens_BL):
    return nnx.merge(graphdef, state)(tokens_BL)


def test_scores_are_the_sum_of_log_softmax_in_input_order(model):
    pairs = some_pairs()
    # A context that has to be cut: only its last tokens may matter.
    long = ids(np.random.default_rng(1), 100)
    pairs.insert(3, (long, [7, 8, 9]))
    scores = score(model, pairs, batch_tokens=256)
    for (context, continuation), got in zip(pairs, scores, strict=True):
        logprob, greedy = by_definition(model, context, continuation)
        assert got.logprob == pytest.approx(logprob, rel=1e-5, abs=1e-5)
        assert (got.tokens, got.is_greedy) == (len(continuation), greedy)
    changed = [5] * 54 + long[54:]  # 48 positions hold the last 46 context tokens and 2 of 3 others
    assert score(model, [(changed, [7, 8, 9])])[0].logprob == pytest.approx(
        scores[3].logprob, abs=1e-5
    )


def test_a_pair_scores_the_same_alone_and_in_any_batch(model):
    pairs = some_pairs(24, seed=2)
    together = score(model, pairs)
    small = score(model, pairs, batch_tokens=128)
    alone = score(model, pairs[:1])
    for a, b in zip(together, small, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
    for a, b in zip(together, alone, strict=False):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


def test_greedy_continuations_are_recognised(model):
    context = [3, 1, 4, 1, 5]
    tokens = list(context)
    for _ in range(4):
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = _forward(*nnx.split(model), padded)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    best = tokens[len(context) :]
    other = [*best[:-1], (best[-1] + 1) % VOCAB]
    greedy, not_greedy = score(model, [(context, best), (context, other)])
    assert greedy.is_greedy and not not_greedy.is_greedy


def test_answers_with_one_input_share_a_forward_pass_and_nothing_changes(model):
    rng = np.random.default_rng(3)
    pairs = [(context, [label]) for context in (ids(rng, 20), ids(rng, 9)) for label in range(5)]
    slow = score(model, pairs, share_inputs=False)
    assert len({round(s.logprob, 6) for s in slow}) == len(pairs)
    for a, b in zip(score(model, pairs), slow, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert a.is_greedy == b.is_greedy


def test_windows_cover_every_token_once_and_never_exceed_the_context():
    context, continuation = np.arange(10), np.arange(100, 135)
    for stride in (1, 3, 8):
        pieces = list(windows(context, continuation, 8, stride))
        targets = np.concatenate([t for _, t in pieces])
        np.testing.assert_array_equal(targets, continuation)
        for inputs, wanted in pieces:
            assert len(wanted) <= len(inputs) <= 8
            # The input ends right before the last target.
            np.testing.assert_array_equal(inputs[len(inputs) - len(wanted) + 1 :], wanted[:-1])
    # With the smallest stride every token has a full context.
    assert all(len(inputs) == 8 for inputs, _ in windows(context, continuation, 8, 1))


def test_a_continuation_longer_than_the_context_is_scored_in_pieces(model, caplog):
    rng = np.random.default_rng(4)
    context, continuation = ids(rng, 5), ids(rng, CONTEXT + 20)
    (whole,) = score(model, [(context, continuation)])
    assert "longer than the context" in caplog.text
    first, rest = continuation[:CONTEXT], continuation[CONTEXT:]
    parts = score(model, [(context, first), (context + first, rest)])
    assert whole.tokens == len(continuation)
    assert whole.logprob == pytest.approx(sum(p.logprob for p in parts), abs=1e-4)


def test_an_empty_context_stands_for_the_prefix_token(model):
    (empty,) = score(model, [([], [1, 2])], prefix_id=9)
    (given,) = score(model, [([9], [1, 2])])
    assert empty == given
    with pytest.raises(UserError, match="pair 0: the context is empty"):
        score(model, [([], [1, 2])])


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([1], []), "line 7: the continuation is empty"),
        (([1], [320]), "line 7, continuation: token id 320 is outside the model's vocabulary"),
        (([-1], [3]), "line 7, context: token id -1 is outside"),
        (([1.5], [3]), "must be a flat list of integers"),
    ],
)
def test_bad_pairs_are_named(model, pair, message):
    with pytest.raises(UserError, match=message):
        score(model, [pair], names=["line 7"])


def test_uniform_logits_give_log_of_the_vocabulary(model):
    model = nnx.clone(model)
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel[...])
    (got,) = score(model, [([1, 2], [3, 4, 5])])
    assert got.logprob == pytest.approx(-3 * np.log(VOCAB), rel=1e-6)
    assert got == Score(got.logprob, 3, False)


def test_a_mesh_changes_nothing(model):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = init_decoder(model.config, seed=0, mesh=mesh)
    pairs = some_pairs(7, seed=5)
    plain = score(model, pairs)
    for a, b in zip(score(sharded, pairs), plain, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        assert a.tokens == b.tokens
