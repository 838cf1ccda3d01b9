"""The MoE block is the one that specs/olmoe.md section 1 describes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.models import Decoder, Execution, MoEConfig, get_preset, init_cache
from olmax.models.config import DecoderConfig
from olmax.models.moe import MoE

SMALL = dataclasses.replace(
    get_preset("olmoe-tiny"), d_model=16, d_ff=12, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8,
    vocab_size=40,
)  # fmt: skip
RNG = np.random.default_rng(0)
X_BLD = jnp.asarray(RNG.standard_normal((2, 5, 16)), jnp.float32)


# The definitions of the kernels: quick to compile, and what the fast ones are tested against.
PLAIN = Execution(experts="reference", router="reference")


def layer(moe: MoEConfig, execution: Execution = PLAIN) -> MoE:
    config = dataclasses.replace(SMALL, moe=moe, init_std=0.5)
    return nnx.jit(lambda: MoE(config, execution, rngs=nnx.Rngs(1)))()


def decoder(moe: MoEConfig) -> Decoder:
    config = dataclasses.replace(SMALL, moe=moe)
    return nnx.jit(lambda: Decoder(config, PLAIN, rngs=nnx.Rngs(0)))()


@jax.jit
def apply(module: MoE, *inputs):
    return module(*inputs)


def by_hand(module: MoE, x_BLD) -> np.ndarray:
    """The chosen experts of every token, weighted and summed, in float64."""
    moe = module.config
    x_TD = np.asarray(x_BLD, np.float64).reshape(-1, 16)
    router, gate_up, down = (
        np.asarray(w[...], np.float64) for w in (module.router, module.gate_up, module.down)
    )
    p_TE = np.exp(x_TD @ router)
    p_TE /= p_TE.sum(-1, keepdims=True)
    out = np.zeros_like(x_TD)
    for t, x in enumerate(x_TD):
        chosen = np.argsort(-p_TE[t])[: moe.experts_per_token]
        weights = p_TE[t, chosen]
        if moe.normalize_weights:
            weights = weights / weights.sum()
        for weight, e in zip(weights, chosen, strict=True):
            gate, up = x @ gate_up[e, 0], x @ gate_up[e, 1]
            out[t] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    return out.reshape(x_BLD.shape)


@pytest.mark.parametrize(
    ("normalize", "execution"), [(False, PLAIN), (True, PLAIN), (False, Execution())]
)
def test_output_is_the_weighted_sum_of_the_most_likely_experts(normalize, execution):
    module = layer(MoEConfig(6, 3, normalize_weights=normalize), execution)
    y_BLD, record = apply(module, X_BLD)
    np.testing.assert_allclose(y_BLD, by_hand(module, X_BLD), atol=2e-5)
    experts_Tk = np.asarray(record.experts_BLk).reshape(-1, 3)
    # Dropless: every token has three different experts, and all pairs are counted.
    assert all(len(set(row)) == 3 for row in experts_Tk)
    counts = np.asarray(record.statistics.counts_SE)
    np.testing.assert_array_equal(counts[0], np.bincount(experts_Tk.ravel(), minlength=6))
    assert counts.sum() == 30


def test_one_expert_may_take_everything_and_others_nothing():
    module = layer(MoEConfig(6, 1))
    # Whatever the token, expert 2 wins: all its inputs are positive.
    x_BLD = jnp.abs(X_BLD)
    module.router[...] = jnp.zeros((16, 6)).at[:, 2].set(5.0)
    y_BLD, record = apply(module, x_BLD)
    assert record.statistics.counts_SE.tolist() == [[0, 0, 10, 0, 0, 0]]
    np.testing.assert_allclose(y_BLD, by_hand(module, x_BLD), atol=2e-5)


def test_padding_goes_nowhere():
    module = layer(MoEConfig(6, 2))
    valid_BL = np.arange(5)[None] < np.array([[5], [3]])
    y_BLD, record = apply(module, X_BLD, jnp.asarray(valid_BL))
    y_BLD, whole_BLD = np.asarray(y_BLD), np.asarray(apply(module, X_BLD)[0])
    np.testing.assert_allclose(y_BLD[valid_BL], whole_BLD[valid_BL], atol=1e-6)
    assert not y_BLD[~valid_BL].any()
    assert record.statistics.counts_SE.sum() == 2 * 8 and record.statistics.tokens_S == 8


def test_shared_expert_is_added_to_every_token():
    module = layer(MoEConfig(6, 2, shared_d_ff=8))
    y_BLD, shared_BLD = apply(module, X_BLD)[0], jax.jit(lambda m, x: m.shared(x))(module, X_BLD)
    np.testing.assert_allclose(y_BLD - shared_BLD, by_hand(module, X_BLD), atol=2e-5)


def test_experts_choose_their_tokens():
    module = layer(MoEConfig(5, 2, routing="expert_choice"))
    y_BLD, record = apply(module, X_BLD)
    # Two of every sequence's five tokens an expert.
    assert record.statistics.counts_SE.tolist() == [[4] * 5] and record.experts_BLk is None
    router, gate_up, down = (
        np.asarray(w[...], np.float64) for w in (module.router, module.gate_up, module.down)
    )
    expected = np.zeros(X_BLD.shape)
    for b, x_LD in enumerate(np.asarray(X_BLD, np.float64)):
        p_LE = np.exp(x_LD @ router)
        p_LE /= p_LE.sum(-1, keepdims=True)
        for e in range(5):
            for t in np.argsort(-p_LE[:, e])[:2]:
                gate, up = x_LD[t] @ gate_up[e, 0], x_LD[t] @ gate_up[e, 1]
                hidden = gate / (1 + np.exp(-gate)) * up
                expected[b, t] += p_LE[t, e] * (hidden @ down[e])
    np.testing.assert_allclose(y_BLD, expected, atol=2e-5)


def test_gradients_are_those_of_the_plain_formula():
    moe = MoEConfig(6, 3)
    module = layer(moe, Execution())
    graphdef, state = nnx.split(module)
    target = jnp.asarray(RNG.standard_normal(X_BLD.shape), jnp.float32)

    def ours(state, x_BLD):
        return jnp.sum(nnx.merge(graphdef, state)(x_BLD)[0] * target)

    def plain(state, x_BLD):
        module = nnx.merge(graphdef, state)
        router, gate_up, down = module.router[...], module.gate_up[...], module.down[...]
        p_BLE = jax.nn.softmax(x_BLD @ router, axis=-1)
        kept = p_BLE >= jax.lax.top_k(p_BLE, moe.experts_per_token)[0][..., -1:]
        h = jnp.einsum("bld,ecdf->blecf", x_BLD, gate_up)
        y = jnp.einsum("blef,efd->bled", jax.nn.silu(h[..., 0, :]) * h[..., 1, :], down)
        return jnp.sum(jnp.einsum("bled,ble->bld", y, p_BLE * kept) * target)

    got, expected = (jax.jit(jax.grad(f, (0, 1)))(state, X_BLD) for f in (ours, plain))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_counts_from_the_configuration_alone():
    config = get_preset("olmoe-1b-7b")
    assert config.num_params == 6_919_161_856
    assert config.num_active_params == 1_281_951_744
    assert config.num_active_non_embedding_params == 1_178_929_152
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == config.num_params
    # 6 a parameter and causal attention: the 7.9 GFLOP of specs/olmoe.md section 5.
    assert config.matmul_flops_per_token() == 6 * 1_178_929_152 + 6 * 16 * 2048 * 4096


@pytest.mark.parametrize("name", ["shared", "expert-choice", "8e", "4e", "dense"])
def test_presets_have_their_counts_and_the_same_active_width(name):
    config = get_preset(f"olmoe-tiny-{name}")
    abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(abstract, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == config.num_params
    moe = config.moe or MoEConfig(1, 1)
    assert config.d_ff * moe.experts_per_token + moe.shared_d_ff == 512
    assert abs(config.num_active_params / get_preset("olmoe-tiny").num_active_params - 1) < 0.01


def test_initialisation_is_a_normal_cut_at_three_deviations():
    module = nnx.jit(lambda: MoE(get_preset("olmoe-tiny"), Execution(), rngs=nnx.Rngs(0)))()
    for weight in (module.router, module.gate_up, module.down):
        values = np.asarray(weight[...])
        assert np.abs(values).max() <= 0.06
        assert 0.0195 < values.std() < 0.0200


def test_decoding_with_a_cache_gives_the_same_hidden_states():
    model = decoder(MoEConfig(6, 2))
    tokens_BL = jnp.asarray(RNG.integers(0, 40, (1, 6)), jnp.int32)
    whole = jax.jit(lambda model, tokens: model.hidden(tokens))(model, tokens_BL)
    cache = init_cache(model.config, 1, 6)

    @jax.jit
    def decode(model, token_BL, cache, position_BL):
        ones = jnp.ones((1, 1), jnp.int32)
        return model.decode(token_BL, cache, positions_BL=position_BL, segment_ids_BL=ones)

    for i in range(6):
        hidden, cache = decode(model, tokens_BL[:, i : i + 1], cache, jnp.full((1, 1), i))
        np.testing.assert_allclose(hidden[:, 0], whole[:, i], atol=1e-5)


def test_expert_choice_refuses_to_generate():
    config = dataclasses.replace(SMALL, moe=MoEConfig(4, 2, routing="expert_choice"))
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    one = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(UserError, match="cannot generate"):
        model.decode(one, init_cache(model.config, 1, 4), positions_BL=one, segment_ids_BL=one)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_experts=4, experts_per_token=5), "experts_per_token=5 is more than"),
        (dict(n_experts=0, experts_per_token=1), "n_experts must be at least 1"),
        (dict(n_experts=4, experts_per_token=1, shared_d_ff=-1), "shared_d_ff"),
    ],
)
def test_bad_configurations_are_named(kwargs, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(**kwargs)


def test_scaled_initialisation_has_no_meaning_for_experts():
    with pytest.raises(UserError, match="init='scaled'"):
        DecoderConfig(
            d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=8, init="scaled",
            moe=MoEConfig(2, 1),
        )  # fmt: skip
