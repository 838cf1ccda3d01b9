"""What makes the decoder OLMo 2's (specs/olmo2.md sections 1 and 15) and Llama 3.1's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.models import Decoder, Execution, get_preset, init_cache, init_paged_cache
from olmax.models.decoder import Block
from olmax.models.norm import rms_norm
from olmax.models.rope import apply_rope, inverse_frequencies, rotation

TINY = dataclasses.replace(get_preset("olmo2-tiny-gqa"), n_layers=3, vocab_size=320)


def make(config=TINY, seed=0, **execution) -> Decoder:
    return Decoder(config, Execution(**execution), rngs=nnx.Rngs(seed))


def tokens(batch=2, length=48, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, TINY.vocab_size)


def one_block(config=TINY):
    block = Block(config, Execution(), rngs=nnx.Rngs(0))
    x_BLD = jax.random.normal(jax.random.key(2), (2, 16, config.d_model))
    positions_BL = jnp.broadcast_to(jnp.arange(16), (2, 16))
    cos_sin = rotation(positions_BL, inverse_frequencies(config.head_dim, config.rope_theta))
    return block, x_BLD, cos_sin


def test_zero_projections_make_a_block_the_identity():
    block, x_BLD, cos_sin = one_block()
    for kernel in (block.attention.out, block.mlp.down):
        kernel[...] = jnp.zeros_like(kernel[...])
    np.testing.assert_array_equal(block(x_BLD, cos_sin)[0], x_BLD)


def test_reordered_norm_hides_the_scale_of_the_attention_output():
    block, x_BLD, cos_sin = one_block()
    block.attention.out[...] *= 50.0  # Large against eps.
    before = block(x_BLD, cos_sin)[0]
    block.attention.out[...] *= 50.0
    after = block(x_BLD, cos_sin)[0]
    np.testing.assert_allclose(after, before, atol=2e-3)
    pre_norm, x_BLD, cos_sin = one_block(dataclasses.replace(TINY, norm_position="input"))
    before = pre_norm(x_BLD, cos_sin)[0]
    pre_norm.attention.out[...] *= 50.0
    assert jnp.abs(pre_norm(x_BLD, cos_sin)[0] - before).max() > 0.5


def test_qk_norm_spans_all_heads_and_hides_the_scale_of_the_projection():
    block, x_BLD, cos_sin = one_block()
    config, attention = TINY, block.attention
    before = block(x_BLD, cos_sin)[0]
    g = config.group_size
    # One head alone grows: a norm per head would not see it, the full-width norm does.
    attention.qkv[...] = attention.qkv[...].at[:, 0, 0].multiply(4.0)
    assert jnp.abs(block(x_BLD, cos_sin)[0] - before).max() > 1e-3
    attention.qkv[...] = attention.qkv[...].at[:, 0, 0].divide(4.0)
    # All query heads grow together: nothing changes.
    attention.qkv[...] = attention.qkv[...].at[:, :, :g].multiply(64.0)
    np.testing.assert_allclose(block(x_BLD, cos_sin)[0], before, atol=1e-4)


def test_full_width_norm_equals_the_norm_of_concatenated_heads():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 8))
    scale = jax.random.normal(jax.random.key(1), (4, 8))
    full = rms_norm(x, scale, 1e-6)
    flat = rms_norm(x.reshape(2, 5, 32), scale.reshape(32), 1e-6)
    np.testing.assert_allclose(full.reshape(2, 5, 32), flat, rtol=1e-6)
    per_head = rms_norm(x, jnp.ones(8), 1e-6) * scale
    assert jnp.abs(per_head - full).max() > 0.1


def test_rope_is_rotate_half_in_float32():
    head_dim, theta = 8, 5e5
    x = np.random.default_rng(0).normal(size=(1, 6, 2, head_dim)).astype(np.float32)
    inv_freq = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.concatenate([np.outer(np.arange(6), inv_freq)] * 2, axis=-1)[None, :, None]
    half = np.concatenate([-x[..., head_dim // 2 :], x[..., : head_dim // 2]], axis=-1)
    expected = x * np.cos(angles) + half * np.sin(angles)
    positions = jnp.arange(6)[None]
    got = apply_rope(jnp.asarray(x), *rotation(positions, inverse_frequencies(head_dim, theta)))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_rope_scores_depend_on_distance_only():
    inv_freq = inverse_frequencies(16, 5e5)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(i, j):
        def rotate(x, position):
            return apply_rope(x, *rotation(jnp.full((1, 1), position), inv_freq))

        return float(jnp.sum(rotate(q, i) * rotate(k, j)))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 4), abs=1e-3)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies():
    scaling = get_preset("llama3.1-8b").rope_scaling
    plain, scaled = inverse_frequencies(128, 5e5), inverse_frequencies(128, 5e5, scaling)
    wavelength = 2 * np.pi / plain
    fast, slow = wavelength < 8192 / 4, wavelength > 8192 / 1
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = ~fast & ~slow
    assert between.any()
    assert np.all((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8))


def test_init_is_a_truncated_normal_of_one_std_everywhere():
    config = dataclasses.replace(get_preset("olmo2-tiny"), n_layers=4, vocab_size=4096)
    model = make(config)
    matrices = {
        "embedding": model.embedder.embedding,
        "qkv": model.blocks.attention.qkv,
        "out": model.blocks.attention.out,
        "gate_up": model.blocks.mlp.gate_up,
        "down": model.blocks.mlp.down,
        "head": model.head.kernel,
    }
    for name, matrix in matrices.items():
        value = np.asarray(matrix[...])
        assert np.abs(value).max() <= 0.06 + 1e-7, name
        np.testing.assert_allclose(value.std(), 0.02 * 0.9866, rtol=0.02, err_msg=name)
        if value.ndim > 2:
            per_layer = value.reshape(4, -1).std(axis=1)
            np.testing.assert_allclose(per_layer, 0.02 * 0.9866, rtol=0.03, err_msg=name)
    assert all(
        np.all(norm[...] == 1) for norm in (model.final_norm.scale, model.blocks.mlp_norm.scale)
    )


def test_scaled_init_shrinks_outputs_with_depth():
    model = make(dataclasses.replace(get_preset("olmo2-tiny"), init="scaled"))
    out = np.asarray(model.blocks.attention.out[...]).reshape(4, -1).std(axis=1)
    expected = 0.9866 / np.sqrt(2 * 128 * np.arange(1, 5))
    np.testing.assert_allclose(out, expected, rtol=0.03)


def test_causality_and_documents():
    model, tokens_BL = make(), tokens()
    logits = model(tokens_BL)
    changed = tokens_BL.at[:, 20].add(1) % TINY.vocab_size
    later = model(changed)
    np.testing.assert_array_equal(later[:, :20], logits[:, :20])
    # Without segments attention crosses document borders (OLMo 2's training) ...
    assert jnp.abs(later[:, 30] - logits[:, 30]).max() > 1e-4
    # ... with segments it does not.
    segments_BL = jnp.where(jnp.arange(48) < 25, 1, 2)[None].repeat(2, 0)
    one = model(tokens_BL, segment_ids_BL=segments_BL)
    two = model(changed, segment_ids_BL=segments_BL)
    np.testing.assert_array_equal(one[:, 25:], two[:, 25:])
    assert jnp.abs(one[:, 20:25] - two[:, 20:25]).max() > 1e-4


def test_a_packed_document_equals_the_document_alone():
    model, tokens_BL = make(), tokens()
    segments_BL = jnp.where(jnp.arange(48) < 25, 1, 2)[None].repeat(2, 0)
    positions_BL = jnp.where(jnp.arange(48) < 25, jnp.arange(48), jnp.arange(48) - 25)[None].repeat(
        2, 0
    )
    packed = model(tokens_BL, segment_ids_BL=segments_BL, positions_BL=positions_BL)
    np.testing.assert_allclose(packed[:, 25:], model(tokens_BL[:, 25:]), atol=1e-5)


@pytest.mark.parametrize("name", ["olmo2-tiny-gqa", "llama3.1-tiny"])
def test_cached_decoding_equals_the_full_forward_pass(name):
    model = make(get_preset(name))
    tokens_BL = tokens(length=80)
    cache = init_cache(model.config, 2, 96)
    positions_BL = jnp.broadcast_to(jnp.arange(80), (2, 80))
    pieces = []
    for start, stop in ((0, 70), (70, 71), (71, 80)):
        hidden, cache = model.decode(
            tokens_BL[:, start:stop],
            cache,
            positions_BL=positions_BL[:, start:stop],
            segment_ids_BL=jnp.ones((2, stop - start), jnp.int32),
        )
        pieces.append(hidden)
    cached = model.logits(jnp.concatenate(pieces, axis=1))
    np.testing.assert_allclose(cached, model(tokens_BL), atol=1e-5)
    assert int(cache.length) == 80


def test_paged_decoding_equals_the_full_forward_pass():
    model = make(get_preset("olmo2-tiny-gqa"))
    tokens_BL = tokens(length=40)
    # Pages in no order, a sequence of 33 tokens and one of 20, then four more.
    table_BT = jnp.array([[5, 0, 3], [2, 6, 99]])
    cache = init_paged_cache(model.config, table_BT, 7, 16)
    lengths = np.array([33, 20])
    positions_BL = jnp.broadcast_to(jnp.arange(40), (2, 40))
    real_BL = jnp.where(jnp.arange(40) < lengths[:, None], 1, 0)
    prompt, cache = model.decode(
        tokens_BL, cache, positions_BL=positions_BL, segment_ids_BL=real_BL, empty=True
    )
    expected = model.hidden(tokens_BL)
    step = jax.jit(lambda model, *args: model.decode(args[0], cache=args[1], **args[2]))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prompt[row, :length], expected[row, :length], atol=1e-5)
    for _ in range(4):
        column_B1 = lengths[:, None]
        hidden, cache = step(
            model,
            jnp.take_along_axis(tokens_BL, column_B1, axis=1),
            cache,
            dict(positions_BL=column_B1, segment_ids_BL=jnp.ones((2, 1), jnp.int32)),
        )
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(hidden[row, 0], expected[row, length], atol=1e-5)
        lengths = lengths + 1
    np.testing.assert_array_equal(cache.lengths_B, [37, 24])
    # Page 1 and 4 belong to nobody.
    np.testing.assert_array_equal(cache.k_NPSC[:, [1, 4]], 0)


@pytest.mark.parametrize("remat", ["full", "dots", "projections"])
@pytest.mark.parametrize("unroll_layers", [False, True])
def test_execution_changes_neither_loss_nor_gradients(remat, unroll_layers):
    def loss(model):
        return jnp.mean(jax.nn.logsumexp(model(tokens(length=24)), axis=-1))

    expected = nnx.value_and_grad(loss)(make())
    got = nnx.value_and_grad(loss)(make(remat=remat, unroll_layers=unroll_layers))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    model = make(compute_dtype="bfloat16")
    logits = model(tokens())
    assert logits.dtype == jnp.float32
    assert model.hidden(tokens()).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, make()(tokens()), atol=0.05)


def test_tied_head_is_the_embedding():
    model = make(dataclasses.replace(TINY, tie_embeddings=True))
    assert not hasattr(model, "head")
    np.testing.assert_array_equal(model.head_kernel(), model.embedder.embedding[...].T)
