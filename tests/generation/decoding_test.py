"""Generated tokens equal those of recomputing everything, whatever is beside a row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.generation import decoding, paging
from olmax.generation.decoding import complete, generate
from olmax.models import Decoder, Llama3RopeScaling, get_preset
from olmax.sharding import MeshConfig, init_decoder, make_mesh

SMALL = dict(n_layers=2, d_model=64, d_ff=128, vocab_size=320, max_seq_len=96)
OLMO2_GQA = dataclasses.replace(get_preset("olmo2-tiny-gqa"), **SMALL)
LLAMA = dataclasses.replace(
    get_preset("llama3.1-tiny"),
    rope_scaling=Llama3RopeScaling(original_max_position_embeddings=32),
    # Wider than the default, so that an untrained tied model does not repeat its input.
    init_std=0.3,
    **SMALL,
)


def make(config) -> Decoder:
    return nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def model() -> Decoder:
    return make(OLMO2_GQA)


def prompts(lengths=(3, 17, 40, 1, 66), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SMALL["vocab_size"], length).tolist() for length in lengths]


@jax.jit(static_argnums=0)
def _logits(graphdef, state, tokens_BL):
    return nnx.merge(graphdef, state)(tokens_BL)


def from_scratch(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, SMALL["max_seq_len"]), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = _logits(*nnx.split(model), padded)
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("config", "cache"),
    [(OLMO2_GQA, "paged"), (LLAMA, "paged"), (OLMO2_GQA, "contiguous")],
    ids=["olmo2-gqa", "llama-scaled-rope", "contiguous cache"],
)
def test_greedy_tokens_equal_those_of_recomputing_from_scratch(config, cache):
    model = make(config)
    completions = generate(model, prompts(), max_new_tokens=20, cache=cache)
    for prompt, got in zip(prompts(), completions, strict=True):
        assert got == from_scratch(model, prompt, 20)
        assert len(set(got)) > 1


@pytest.mark.parametrize("cache", ["paged", "contiguous"])
def test_long_prompts_are_read_in_pieces(model, monkeypatch, cache):
    whole = generate(model, prompts(), max_new_tokens=5)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 16)
    assert generate(model, prompts(), max_new_tokens=5, cache=cache) == whole


def test_short_prompts_are_read_apart_from_long_ones(model, monkeypatch):
    together = generate(model, prompts(), max_new_tokens=5)
    monkeypatch.setattr(paging, "SPARED_TOKENS", 1)
    read = []
    prefill = decoding._prefill_paged

    def recorded(graphdef, params, state, tokens_GL, *args, **kwargs):
        read.append(tokens_GL.shape)
        return prefill(graphdef, params, state, tokens_GL, *args, **kwargs)

    monkeypatch.setattr(decoding, "_prefill_paged", recorded)
    assert generate(model, prompts(), max_new_tokens=5) == together
    # Prompts of 66 and 40, of 17, of 3 and 1.
    assert read == [(2, 96), (1, 24), (2, 16)]


def test_a_row_ends_where_the_context_ends(model):
    (row,) = complete(model, prompts([90]), max_new_tokens=50)
    assert len(row.ids) == 6 and row.finish_reason == "length"
    assert row.ids == from_scratch(model, prompts([90])[0], 6)


def test_stop_tokens_end_a_row_and_are_left_out(model):
    free = generate(model, prompts([5, 9]), max_new_tokens=12)
    stop = next(token for token in free[0][1:] if token not in free[1])
    first = free[0].index(stop)
    row, other = complete(
        model, prompts([5, 9]), max_new_tokens=12, stop_token_ids=[stop, *range(300, 310)]
    )
    assert row.ids == free[0][:first] and row.finish_reason == "stop"
    early = [i for i, token in enumerate(free[1]) if 300 <= token < 310]
    assert other.ids == free[1][: early[0] if early else 12]


def test_samples_depend_on_seed_and_number_not_on_the_neighbours(model):
    settings = dict(max_new_tokens=12, temperature=1.0, top_p=0.9, top_k=50)
    some = prompts([3, 12, 7, 1])
    together = generate(model, some, seed=3, **settings)
    assert generate(model, some, seed=3, batch_size=1, **settings) == together
    assert generate(model, some[:1], seed=3, **settings) == together[:1]
    assert generate(model, some, seed=4, **settings) != together
    # A seed for every row: the row is what it would be alone with that seed.
    a, b, c, _ = generate(model, [some[0]] * 4, seed=[3, 5, 3, 3], **settings)
    assert a == c == together[0] != b


def test_every_token_is_reported_in_order_and_a_row_can_be_ended(model):
    seen = {0: [], 1: []}

    def on_token(row, token):
        seen[row].append(token)
        return row == 0 and len(seen[0]) == 3

    rows = complete(model, prompts([4, 8]), max_new_tokens=20, on_token=on_token)
    assert [row.ids for row in rows] == [seen[0], seen[1]]
    assert (len(rows[0].ids), rows[0].finish_reason) == (3, "stop")
    assert (len(rows[1].ids), rows[1].finish_reason) == (20, "length")
    free = generate(model, prompts([4, 8]), max_new_tokens=20)
    assert rows[0].ids == free[0][:3] and rows[1].ids == free[1]


def test_calls_of_similar_shape_do_not_compile_again(model):
    generate(model, prompts([9, 11]), max_new_tokens=10)
    before = decoding._decode_round._cache_size()
    generate(model, prompts([12, 14]), max_new_tokens=13, stop_token_ids=[1, 2])
    assert decoding._decode_round._cache_size() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prompts=[[1], []]), "prompt 1: the prompt is empty"),
        (dict(prompts=[[1] * 96]), "has 96 tokens, which leaves no room .* context of 96"),
        (dict(prompts=[[320]]), "prompt 0: token id 320 is outside"),
        (dict(prompts=[[320]], names=["in.jsonl:4"]), "in.jsonl:4: token id 320"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1.0), "temperature -1.0"),
        (dict(top_p=0.0), "top_p 0.0"),
        (dict(top_k=-1), "top_k -1"),
        (dict(seed=[1, 2]), "2 seeds for 1 prompts"),
        (dict(seed=-1), "seed -1 must be from 0"),
        (dict(cache="rolling"), "cache 'rolling' is none of contiguous, paged"),
    ],
)
def test_bad_arguments(model, change, message):
    arguments = dict(prompts=[[1]], max_new_tokens=1) | change
    with pytest.raises(UserError, match=message):
        complete(model, arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize("cache", ["paged", "contiguous"])
def test_a_mesh_changes_nothing(model, cache):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = init_decoder(OLMO2_GQA, seed=0, mesh=mesh)
    wanted = generate(model, prompts([3, 17, 9]), max_new_tokens=8)
    assert generate(sharded, prompts([3, 17, 9]), max_new_tokens=8, cache=cache) == wanted


def test_bfloat16_runs(model):
    execution = dataclasses.replace(model.execution, compute_dtype="bfloat16")
    low = nnx.jit(lambda: Decoder(OLMO2_GQA, execution, rngs=nnx.Rngs(0)))()
    assert [len(ids) for ids in generate(low, prompts([3, 8]), max_new_tokens=4)] == [4, 4]
    assert low.embedder.embedding[...].dtype == jnp.float32
