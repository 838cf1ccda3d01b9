"""Compiling the real train step for devices that are not here."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas import targets
from olmax import sharding
from olmax.errors import UserError
from olmax.models.config import DecoderConfig, Execution
from olmax.models.decoder import Decoder
from olmax.training.objectives import NextToken
from olmax.training.optimizers import AdamWConfig
from olmax.training.schedules import ScheduleConfig
from olmax.training.step import TrainStep, make_train_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step, bytes per device."""

    text: str
    """The optimised program; empty when it was refused."""
    total_bytes: int
    """Arguments, temporaries and code."""
    temporary_bytes: int
    """Of these, what lives during a step only; 0 when it was refused."""
    compile_seconds: float
    refused: str | None = None
    """The compiler's reason when the program does not fit the device's memory."""


def build(
    model: DecoderConfig,
    execution: Execution,
    mesh: Mesh | None,
    *,
    tokens_per_step: int,
    accumulation: int = 1,
) -> TrainStep:
    """The train step of a model with the trainer's objective and optimiser, from shapes alone; for
    the platform that is compiled for (`targets.compiling_for`).
    """
    # The length of the schedule changes constants only.
    schedule = ScheduleConfig().resolve(10_000, tokens_per_step)
    return make_train_step(
        lambda rngs: Decoder(model, execution, rngs=rngs),
        NextToken(),
        AdamWConfig(),
        schedule,
        tokens_per_step=tokens_per_step,
        accumulation=accumulation,
        mesh=mesh,
    )


def compile_step(step: TrainStep, batch_size: int, seq_len: int) -> CompiledStep:
    """Compiles a step for the devices of its mesh.

    Raises:
      UserError: the compiler refuses it for another reason than memory.
    """
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    batch = step.abstract_batch({"tokens": tokens})
    start = time.monotonic()
    with targets.compiling_for("tpu"):
        lowered = step.step.trace(step.abstract_state, batch).lower(lowering_platforms=("tpu",))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        size = _needed(message, device_bytes((step.abstract_state, batch)))
        if size is None:
            first = message.strip().splitlines()[0]
            raise UserError(f"the TPU compiler refuses this step: {first[:300]}") from error
        reason = message.strip().splitlines()[0]
        return CompiledStep("", size, 0, time.monotonic() - start, reason)
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return CompiledStep(
        compiled.as_text(), total, memory.temp_size_in_bytes, time.monotonic() - start
    )


def _needed(message: str, argument_bytes: int) -> int | None:
    """Bytes a device would need, from the compiler's message that it has too few; None for another
    message.
    """
    if "RESOURCE_EXHAUSTED" not in message or "hbm" not in message.lower():
        return None
    everything = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    temporaries = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message)
    if everything:
        return int(float(everything[1]) * _UNITS[everything[2]])
    if temporaries:
        return argument_bytes + int(float(temporaries[1]) * _UNITS[temporaries[2]])
    return None


def device_bytes(tree: Any) -> int:
    """Bytes one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape)
        * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def check(model: DecoderConfig, mesh: Mesh, batch_size: int, seq_len: int, accumulation: int):
    """Checks that the step can be cut over the mesh.

    Raises:
      UserError: the mesh does not divide the model or the batch.
    """
    sharding.check_divisible(model, mesh)
    shards = sharding.batch_shards(mesh)
    pieces = shards * accumulation
    if batch_size % pieces:
        below, above = batch_size // pieces * pieces, -(-batch_size // pieces) * pieces
        choices = f"{below} or {above}" if below else f"{above}"
        raise UserError(
            f"batch size {batch_size} does not divide over {shards} batch shards"
            + (f" x {accumulation} micro-batches" if accumulation > 1 else "")
            + f"; take {choices}, or a mesh with fewer devices along data and fsdp"
        )
    if seq_len % mesh.shape["context"]:
        raise UserError(
            f"sequence length {seq_len} does not divide over context={mesh.shape['context']}"
        )
