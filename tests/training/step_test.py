"""The compiled step: accumulation, sharding, compilation from shapes, precision."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax import sharding
from olmax.models import Decoder, Execution
from olmax.training.names import named_leaves
from olmax.training.objectives import NextToken
from olmax.training.optimizers import AdamWConfig
from olmax.training.schedules import ScheduleConfig
from olmax.training.step import make_train_step
from tests.training.tiny_training import MODEL

SCHEDULE = ScheduleConfig("constant", 1e-2)


@functools.cache
def make(accumulation=1, mesh=None, objective=NextToken(1e-4), execution=Execution(), **changes):
    return make_train_step(
        lambda rngs: Decoder(MODEL, execution, rngs=rngs),
        objective,
        AdamWConfig(**changes),
        SCHEDULE,
        accumulation=accumulation,
        mesh=mesh,
    )


def batches(n, rows=8):
    """Batches whose rows have very different numbers of targets; one row has none."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        tokens = rng.integers(0, MODEL.vocab_size, (rows, 16)).astype(np.int32)
        mask = rng.random((rows, 16)) < np.linspace(0, 1, rows)[:, None]
        yield {"tokens": tokens, "loss_mask": mask}


class Run(NamedTuple):
    state: dict[str, np.ndarray]
    history: list[dict[str, float]]
    gradients: dict[str, np.ndarray]
    """Of the first step, clipped: Adam's first moments after it, undone of their factor."""


def run(train_step, n=3) -> Run:
    state = train_step.initialize()
    history, gradients = [], {}
    for batch in batches(n):
        state, metrics = train_step.step(state, train_step.place(batch))
        history.append({name: float(value) for name, value in metrics.items()})
        if len(history) == 1:
            moments = named_leaves(state.opt_state["adam"].mu)
            gradients = {name: np.asarray(x) / (1 - 0.9) for name, x in moments.items()}
    state = {name: np.asarray(x) for name, x in named_leaves(state).items()}
    return Run(state, history, gradients)


@pytest.fixture(scope="module")
def plain():
    return run(make())


def assert_same(got: Run, expected: Run):
    """The first step to rounding: metrics, and every gradient against the largest of its array.

    Adam divides each gradient by its own size, so where it is nearly zero its rounding moves a
    parameter by up to the learning rate, 1e-2. Later steps are therefore held to 2e-4, and
    parameters to a root mean square difference of 2e-5.
    """
    assert got.history[0] == pytest.approx(expected.history[0], rel=2e-6, abs=1e-8)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        size = np.abs(value).max()
        np.testing.assert_allclose(got.gradients[name], value, atol=5e-6 * size, err_msg=name)
    for step, (left, right) in enumerate(zip(got.history, expected.history, strict=True)):
        assert left == pytest.approx(right, rel=2e-4), step
    assert got.state.keys() == expected.state.keys()
    for name, value in expected.state.items():
        difference = got.state[name].astype(np.float64) - value
        assert np.sqrt(np.mean(difference**2)) < 2e-5, name


def test_accumulation_changes_only_rounding(plain):
    assert_same(run(make(4)), plain)


def test_accumulation_over_all_tokens():
    objective = NextToken(1e-4, denominator="tokens")
    assert_same(run(make(4, objective=objective)), run(make(objective=objective)))


@functools.cache
def make_sharded():
    """With accumulation, on a mesh that cuts the batch and the parameters both ways."""
    return make(2, sharding.make_mesh("fsdp=4,tensor=2"))


def test_sharded_equals_unsharded(plain):
    assert_same(run(make_sharded()), plain)


def test_moments_lie_like_their_parameters():
    train_step = make_sharded()
    state = train_step.initialize()
    leaves = named_leaves(state)
    for name, leaf in leaves.items():
        assert leaf.sharding == named_leaves(train_step.abstract_state)[name].sharding
        if name.startswith("params."):
            rest = name.removeprefix("params.")
            for moment in ("mu", "nu"):
                assert leaves[f"opt_state.adam.{moment}.{rest}"].sharding == leaf.sharding
    assert leaves["params.head.kernel"].addressable_shards[0].data.shape == (4, 32)


def test_the_step_compiles_from_shapes_alone():
    train_step = make_sharded()
    batch = train_step.abstract_batch(
        {
            "tokens": jax.ShapeDtypeStruct((8, 16), jnp.int32),
            "loss_mask": jax.ShapeDtypeStruct((8, 16), jnp.bool_),
        }
    )
    compiled = train_step.step.lower(train_step.abstract_state, batch).compile()
    state, metrics = compiled(train_step.initialize(), train_step.place(next(batches(1))))
    assert int(state.step) == 1 and np.isfinite(metrics["loss"])


def test_steps_are_deterministic_and_donate(plain):
    again = run(make())
    assert again.history == plain.history
    assert all((again.state[name] == value).all() for name, value in plain.state.items())
    train_step = make()
    state = train_step.initialize()
    train_step.step(state, train_step.place(next(batches(1))))
    assert state.params["head"]["kernel"][...].is_deleted()


def test_bfloat16_computes_and_float32_is_kept(plain):
    train_step = make(execution=Execution(compute_dtype="bfloat16"))
    state, history, _ = run(train_step)
    assert {str(x.dtype) for name, x in state.items() if "." in name} == {"float32", "int32"}
    pairs = zip(history, plain.history, strict=True)
    differences = [abs(a["loss"] - b["loss"]) for a, b in pairs]
    assert 0 < max(differences) < 0.05


def test_adopted_parameters_are_those_given():
    train_step = make()
    model = Decoder(MODEL, rngs=nnx.Rngs(7))
    expected = {name: np.asarray(x) for name, x in named_leaves(nnx.state(model)).items()}
    state = train_step.adopt(nnx.state(model))
    assert int(state.step) == 0
    for name, value in named_leaves(state.params).items():
        assert (np.asarray(value) == expected[name]).all()
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))


def test_a_batch_without_targets_changes_nothing_but_by_decay():
    train_step = make()
    state = train_step.initialize()
    before = {name: np.asarray(x) for name, x in named_leaves(state.params).items()}
    batch = next(batches(1)) | {"loss_mask": np.zeros((8, 16), bool)}
    state, metrics = train_step.step(state, train_step.place(batch))
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    for name, value in named_leaves(state.params).items():
        decay = 1 if name == "embedder.embedding" else 1 - 1e-2 * 0.1
        np.testing.assert_allclose(np.asarray(value), before[name] * decay, rtol=1e-6)


def test_other_variables_are_refused():
    class WithStatistics(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(4, rngs=rngs)

    with pytest.raises(ValueError, match=r"only .*Param"):
        make_train_step(WithStatistics, NextToken(), AdamWConfig(no_decay=()), SCHEDULE)
