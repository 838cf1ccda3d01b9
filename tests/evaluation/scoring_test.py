"""Log-likelihoods against the definition, whatever is beside a pair in its batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.evaluation.rows import group, make_rows, windows
from olmax.evaluation.scoring import Score, score
from olmax.models.config import MoEConfig
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


@pytest.mark.parametrize("longest", [1, 9])
def test_continuations_of_one_context_share_a_row_and_nothing_changes(model, longest):
    rng = np.random.default_rng(3)
    contexts = [ids(rng, 20), ids(rng, 9), ids(rng, 1), ids(rng, CONTEXT + 5)]
    # More than fit one row, and in turns, as no suite has them.
    pairs = [
        (context, [number, *ids(rng, number % longest)])
        for number in range(11)
        for context in contexts
    ]
    slow = score(model, pairs, share_contexts=False)
    assert len({round(s.logprob, 6) for s in slow}) == len(pairs)
    for a, b in zip(score(model, pairs), slow, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert a.is_greedy == b.is_greedy


def test_a_question_is_read_once(model):
    rng = np.random.default_rng(6)
    pairs = [(context, ids(rng, 3)) for context in (ids(rng, 30), ids(rng, 20)) for _ in range(4)]
    names = [str(i) for i in range(len(pairs))]

    def rows(**settings):
        options = dict(stride=CONTEXT, prefix_id=None, share_contexts=True) | settings
        return make_rows(model.config, pairs, names, **options)[0]

    shared = rows()
    assert [row.length for row in shared] == [30 + 4 * 2, 20 + 4 * 2]
    assert [row.scored for row in shared] == [12, 12]
    assert sum(row.length for row in rows(share_contexts=False)) == 4 * (30 + 2) + 4 * (20 + 2)
    first = shared[0]
    np.testing.assert_array_equal(
        first.predicting_T(), [29, 30, 31, 29, 32, 33, 29, 34, 35, 29, 36, 37]
    )
    np.testing.assert_array_equal(first.positions_L()[28:], [28, 29, *[30, 31] * 4])
    experts = dataclasses.replace(
        model.config, moe=MoEConfig(4, 1, routing="expert_choice"), qk_norm="none"
    )
    apart = make_rows(experts, pairs, names, stride=CONTEXT, prefix_id=None, share_contexts=True)[0]
    assert len(apart) == len(pairs)


def test_shapes_are_joined_only_where_compiling_costs_more_than_padding(model):
    rng = np.random.default_rng(7)

    def shapes(count):
        pairs = [(ids(rng, length), ids(rng, 2)) for length in (8, 40) for _ in range(count)]
        names = [""] * len(pairs)
        rows, _ = make_rows(
            model.config, pairs, names, stride=CONTEXT, prefix_id=None, share_contexts=True
        )
        found = group(rows, model.config, None)
        assert sum(len(members) for _, members in found) == len(rows)
        for shape, members in found:
            assert all(row.length <= shape.length and row.scored <= shape.scored for row in members)
        return [shape.length for shape, _ in found]

    assert shapes(3) == [48]
    assert shapes(40_000) == [16, 48]


def test_windows_cover_every_token_once_and_never_exceed_the_context():
    context, continuation = np.arange(10), np.arange(100, 135)
    for stride in (1, 3, 8):
        pieces = list(windows(context, continuation, 8, stride))
        targets = np.concatenate([t for _, t in pieces])
        np.testing.assert_array_equal(targets, continuation)
        everything = np.concatenate([context, continuation])
        for before, wanted in pieces:
            assert len(before) >= 1 and len(before) + len(wanted) - 1 <= 8
            start = np.flatnonzero(everything == wanted[0])[0]
            np.testing.assert_array_equal(before, everything[start - len(before) : start])
    # With the smallest stride every token has a full context.
    assert all(len(before) == 8 for before, _ in windows(context, continuation, 8, 1))


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
