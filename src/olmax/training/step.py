"""The training state and the compiled step, from shapes alone.

`make_train_step` computes nothing: it gives abstract state, shardings and jitted functions, so that
a planner can lower and compile the step for machines that are not there.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from olmax import sharding
from olmax.training.objectives import Batch, Objective
from olmax.training.optimizers import AdamWConfig, SkipStepState, make_optimizer
from olmax.training.schedules import ScheduleConfig, learning_rate
from olmax.training.tpu_options import compiler_options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training carries from step to step."""

    step: jax.Array
    """int32: updates made."""
    seed: jax.Array
    """uint32: with the step, the source of all randomness inside the step."""
    params: nnx.State
    """Parameters as NNX state, in the dtype the model creates them in (the float32 master)."""
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The pieces of training one model, as jitted functions and shapes."""

    graphdef: nnx.GraphDef
    abstract_state: TrainState
    """`jax.ShapeDtypeStruct` leaves with their shardings."""
    initialize: Callable[[], TrainState]
    """A fresh state; the values depend on the seed, not on the mesh."""
    adopt: Callable[[nnx.State], TrainState]
    """A state that starts from given parameters with a fresh optimiser; donates them."""
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    """One update; donates the state. Metrics are float32 scalars: `loss`, those of the objective,
    `grad_norm` (before clipping), `learning_rate`, and `skipped` (1 for a skipped step) if steps
    can be skipped."""
    mesh: Mesh | None

    def model(self, params: nnx.State) -> nnx.Module:
        """The model with these parameters (shared, not copied)."""
        return nnx.merge(self.graphdef, params)

    def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """This host's rows as global arrays on the mesh."""
        if self.mesh is None:
            return {name: jax.device_put(array) for name, array in batch.items()}
        return {
            name: jax.make_array_from_process_local_data(
                sharding.batch_sharding(self.mesh, array.ndim), array
            )
            for name, array in batch.items()
        }

    def abstract_batch(
        self, batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Global shapes and dtypes with the shardings of `place`, to lower the step with."""
        if self.mesh is None:
            return dict(batch)
        return {
            name: jax.ShapeDtypeStruct(
                array.shape,
                array.dtype,
                sharding=sharding.batch_sharding(self.mesh, len(array.shape)),
            )
            for name, array in batch.items()
        }


def make_train_step(
    build: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective,
    optimizer: AdamWConfig,
    schedule: ScheduleConfig,
    *,
    tokens_per_step: int = 1,
    accumulation: int = 1,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.DEFAULT_RULES,
) -> TrainStep:
    """Training of the model that `build` makes.

    Args:
      build: makes the model; all its variables must be `nnx.Param`.
      objective: see `olmax.training.objectives`.
      optimizer: see `AdamWConfig`.
      schedule: with its duration resolved.
      tokens_per_step: for schedules in tokens, and for the compiler's options.
      accumulation: micro-batches that a batch is cut into; divides the batch size.
      seed: of the initial parameters and of the randomness inside the steps.
      mesh: None: one device.
      rules: logical axes to mesh axes.

    Raises:
      UserError: a weight-decay pattern that matches nothing.
      ValueError: variables other than parameters.
    """

    def create():
        graphdef, params, rest = nnx.split(build(nnx.Rngs(seed)), nnx.Param, ...)
        if jax.tree.leaves(rest):
            raise ValueError(f"only nnx.Param variables can be trained, the model has {rest}")
        return graphdef, params

    graphdef, abstract_params = jax.eval_shape(create)
    tx = make_optimizer(optimizer, abstract_params)

    def with_optimizer(params):
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            seed=jnp.asarray(seed, jnp.uint32),
            params=params,
            opt_state=tx.init(params),
        )

    abstract_state = jax.eval_shape(with_optimizer, abstract_params)
    shardings = device_shardings(abstract_state, mesh, rules)
    abstract_state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        abstract_state,
        shardings,
    )

    def step(state: TrainState, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(state.seed), state.step)
        with sharding.use_mesh(mesh, rules):
            loss, metrics, grads = _gradients(
                graphdef, objective, state.params, batch, rng, accumulation
            )
        if mesh is not None:
            grads = jax.lax.with_sharding_constraint(grads, shardings.params)
        grad_norm = optax.tree.norm(grads)
        rate = learning_rate(schedule, state.step + 1, tokens_per_step)
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            learning_rate=rate,
            loss=loss.value,
            grad_norm=grad_norm,
        )
        values = {name: mean.value for name, mean in metrics.items()}
        values |= {"loss": loss.value, "grad_norm": grad_norm, "learning_rate": rate}
        if isinstance(opt_state, SkipStepState):
            values["skipped"] = opt_state.skipped.astype(jnp.float32)
        params = jax.tree.map(jnp.add, state.params, updates)
        return TrainState(state.step + 1, state.seed, params, opt_state), values

    everywhere = None if mesh is None else sharding.replicated(mesh)
    outputs = None if mesh is None else shardings
    return TrainStep(
        graphdef=graphdef,
        abstract_state=abstract_state,
        initialize=jax.jit(lambda: with_optimizer(create()[1]), out_shardings=outputs),
        adopt=jax.jit(with_optimizer, donate_argnums=0, out_shardings=outputs),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=None if mesh is None else (shardings, everywhere),
            compiler_options=compiler_options(mesh, tokens_per_step // accumulation),
        ),
        mesh=mesh,
    )


def _gradients(graphdef, objective, params, batch, rng, accumulation):
    """(loss Mean, metric Means, gradient of the mean loss in float32) of a batch in
    `accumulation` pieces.
    """

    def total(params, batch, rng):
        loss, metrics = objective(nnx.merge(graphdef, params), batch, rng)
        return loss.total, (loss, metrics)

    def one(batch, rng):
        grads, (loss, metrics) = jax.grad(total, has_aux=True)(params, batch, rng)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), loss, metrics

    if accumulation == 1:
        grads, loss, metrics = one(batch, rng)
    else:
        # Row i of a batch goes to micro-batch i % accumulation, so that every device keeps its own
        # rows when the batch axis is sharded.
        pieces = jax.tree.map(
            lambda x: jnp.moveaxis(
                x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:]), 1, 0
            ),
            batch,
        )
        rngs = jax.random.split(rng, accumulation)
        first = jax.tree.map(lambda x: x[0], (pieces, rngs))
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, *first)
        )

        def add(sums, piece):
            return jax.tree.map(jnp.add, sums, one(*piece)), None

        (grads, loss, metrics), _ = jax.lax.scan(add, zeros, (pieces, rngs))
    some = loss.weight > 0
    scale = jnp.where(some, 1 / jnp.where(some, loss.weight, 1), 0)
    return loss, metrics, jax.tree.map(lambda g: g * scale, grads)


def device_shardings(tree: Any, mesh: Mesh | None, rules: sharding.Rules) -> Any:
    """A tree like `tree` of shardings: variables by their logical axes (so optimiser moments lie
    like their parameters), all else replicated. No mesh: the first device.
    """
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, tree)

    def is_variable(node):
        return isinstance(node, nnx.Variable)

    def where(node):
        if is_variable(node):
            return sharding.param_shardings(node, mesh, rules)
        return sharding.replicated(mesh)

    return jax.tree.map(where, tree, is_leaf=is_variable)
