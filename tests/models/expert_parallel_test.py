"""Cut over devices in whatever way, a mixture of experts computes the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from kernels_pallas import targets
from olmax import sharding
from olmax.errors import UserError
from olmax.models import Execution, MoEConfig, get_preset, moe
from olmax.models.expert_parallel import exchange, exchange_plan
from olmax.models.expert_words import experts_by_words
from olmax.models.moe import MoE
from olmax.training.objectives import NextToken
from olmax.training.router_losses import RouterLosses

CONFIG = dataclasses.replace(
    get_preset("olmoe-tiny"), d_model=16, d_ff=8, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8,
    vocab_size=32, moe=MoEConfig(8, 3, shared_d_ff=8),
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 32, (8, 6)).astype(np.int32)


def loss_and_gradients(config, mesh):
    mesh = None if mesh is None else sharding.make_mesh(mesh)
    # Quick to compile eight times over; what is tested is what happens between devices.
    execution = Execution(experts="reference", router="reference")
    graphdef, state = nnx.split(sharding.init_decoder(config, execution, seed=0, mesh=mesh))
    # Large weights, so that the auxiliary losses matter in the gradients.
    objective = NextToken(router=RouterLosses(load_balance=0.5, z=0.1, statistics="global"))

    def total(state):
        with sharding.use_mesh(mesh):
            loss, metrics = objective(
                nnx.merge(graphdef, state), {"tokens": jnp.asarray(TOKENS)}, jax.random.key(0)
            )
        return loss.value, metrics["max_violation"].value

    (loss, violation), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(state)
    return float(loss), float(violation), [np.asarray(g) for g in jax.tree.leaves(gradients)]


@pytest.fixture(scope="module")
def alone():
    return loss_and_gradients(CONFIG, None)


@pytest.mark.parametrize(
    "mesh",
    [
        "fsdp=8",
        "fsdp=2,expert=4",
        pytest.param("expert=2,tensor=2,context=2", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(alone, mesh):
    loss, violation, gradients = loss_and_gradients(CONFIG, mesh)
    assert loss == pytest.approx(alone[0], abs=2e-6)
    assert violation == pytest.approx(alone[1], abs=1e-6)
    for got, expected in zip(gradients, alone[2], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_experts_that_choose_tokens_do_not_depend_on_the_mesh():
    config = dataclasses.replace(CONFIG, n_layers=1, moe=MoEConfig(4, 2, routing="expert_choice"))
    alone = loss_and_gradients(config, None)
    loss, _, gradients = loss_and_gradients(config, "fsdp=2,expert=4")
    assert loss == pytest.approx(alone[0], abs=2e-6)
    for got, expected in zip(gradients, alone[2], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_rows_reach_the_device_of_their_expert_and_come_back():
    mesh = sharding.make_mesh("expert=4", jax.devices()[:4])
    counts = np.array([[3, 0, 2, 1, 0, 0, 0, 0], [0] * 6 + [6, 0], [1, 1, 1, 1, 1, 1, 0, 0],
                       [0, 6, 0, 0, 0, 0, 0, 0]], np.int32)  # fmt: skip
    # A row says who sent it (hundreds), for which expert (tens), and which of those it is.
    rows = np.array(
        [[100 * p + 10 * e + i for e in range(8) for i in range(counts[p, e])] for p in range(4)]
    )

    def there_and_back(x_MD, counts_E):
        plan = exchange_plan(counts_E[0], rows=6, most=6, axes=("expert",))
        here = exchange(x_MD, plan, ("expert",))
        back = exchange(here, plan.reversed(), ("expert",))
        return here, plan.counts_E[None], back

    spec = PartitionSpec("expert")
    mapped = jax.shard_map(
        there_and_back, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False
    )
    x_MD = rows.reshape(-1, 1).astype(np.float32)
    sorted_rows, here, back = jax.jit(mapped)(x_MD, counts)
    np.testing.assert_array_equal(back, x_MD)
    np.testing.assert_array_equal(np.asarray(here).ravel(), counts.sum(0))
    for device, got in enumerate(np.asarray(sorted_rows).reshape(4, 24)):
        expected = sorted(
            (row for row in rows.ravel() if row // 10 % 10 // 2 == device),
            key=lambda row: (row // 10 % 10, row),
        )
        np.testing.assert_array_equal(got[: len(expected)], expected)
        assert not got[len(expected) :].any()


def test_what_an_exchange_leaves_undefined_is_read_by_nobody(monkeypatch):
    """Rows of padding, and what lies behind the rows that arrive, are NaN in both directions."""

    def poisoned(x, plan, axes):
        me = jax.lax.axis_index(axes)
        arrived = jnp.arange(plan.rows)[:, None] < jnp.sum(plan.sizes_PPE[:, me])
        return jnp.where(arrived, exchange(x, plan, axes), jnp.nan)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
    def nan_elsewhere(x, plan, axes):
        return poisoned(x, plan, axes)

    nan_elsewhere.defvjp(
        lambda x, plan, axes: (poisoned(x, plan, axes), plan),
        lambda axes, plan, d: (poisoned(d, plan.reversed(), axes), None),
    )
    config = dataclasses.replace(CONFIG, n_layers=1, moe=MoEConfig(8, 3))
    execution = Execution(experts="reference", router="xla")
    module = MoE(config, execution, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    x_BLD = jax.random.normal(jax.random.key(0), (8, 6, config.d_model))
    valid_BL = jnp.arange(6) < jnp.asarray([6, 5, 0, 3, 6, 1, 2, 4])[:, None]

    def run(mesh):
        def total(state, x_BLD):
            with sharding.use_mesh(mesh):
                y_BLD, _ = nnx.merge(graphdef, state)(x_BLD, valid_BL)
            return jnp.sum(jnp.sin(y_BLD)), y_BLD

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(state, x_BLD)

    expected = run(None)
    monkeypatch.setattr(moe, "exchange", nan_elsewhere)
    got = run(sharding.make_mesh("fsdp=2,expert=4"))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_rows_may_travel_as_words(monkeypatch):
    """As on TPUs, with the kernels interpreted: the same output and gradients, padding included."""
    config = dataclasses.replace(CONFIG, d_model=2048, d_ff=128, n_layers=1, moe=MoEConfig(4, 2))
    execution = Execution(experts="reference", router="xla", compute_dtype="bfloat16")
    graphdef, state = nnx.split(MoE(config, execution, rngs=nnx.Rngs(0)))
    x_BLD = jax.random.normal(jax.random.key(0), (4, 6, 2048), jnp.bfloat16)
    valid_BL = jnp.arange(6) < jnp.asarray([6, 5, 0, 3])[:, None]
    mesh = sharding.make_mesh("fsdp=2,expert=2", jax.devices()[:4])

    def run():
        def total(state, x_BLD):
            with sharding.use_mesh(mesh):
                y_BLD, _ = nnx.merge(graphdef, state)(x_BLD, valid_BL)
            return jnp.sum(jnp.sin(4 * y_BLD.astype(jnp.float32))), y_BLD

        return jax.jit(jax.grad(total, (0, 1), has_aux=True))(state, x_BLD)

    expected = run()
    monkeypatch.setattr(MoE, "_takes_words", lambda *_: True)
    monkeypatch.setattr(
        moe, "experts_by_words", lambda *arguments: experts_by_words(*arguments, True)
    )
    for one, other in zip(jax.tree.leaves(run()), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=0.01 * np.abs(other).max())


def test_words_are_for_the_kernels_of_tpus():
    def takes(config, **execution):
        module = nnx.eval_shape(lambda: MoE(config, Execution(**execution), rngs=nnx.Rngs(0)))
        return module._takes_words(jnp.bfloat16, module.gate_up.shape)

    wide = dataclasses.replace(CONFIG, d_model=2048, d_ff=128, moe=MoEConfig(2, 1))
    assert not takes(wide)
    with targets.compiling_for("tpu"):
        assert takes(wide, experts="pallas_tpu")
        assert not takes(wide, experts="ragged")
        assert not takes(wide, experts="pallas_tpu", router="pallas_tpu")
        assert not takes(CONFIG, experts="pallas_tpu")


def test_a_mesh_that_does_not_divide_the_experts_is_an_error():
    config = dataclasses.replace(CONFIG, moe=MoEConfig(6, 2))
    with pytest.raises(UserError, match=r"expert=4 does not divide moe\.n_experts=6"):
        sharding.check_divisible(config, sharding.make_mesh("expert=4,fsdp=2"))
