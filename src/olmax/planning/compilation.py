"""Compiling the real train step for devices that are not here."""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import re
import threading
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
from olmax.planning import lowering, optimised
from olmax.training.objectives import NextToken
from olmax.training.optimizers import AdamWConfig
from olmax.training.schedules import ScheduleConfig
from olmax.training.step import TrainStep, make_train_step

# What a step's machine code takes at most, of those seen (docs/planning.md); counted where it has
# not been made.
_CODE_BYTES = 128 * 2**20

_POLL_SECONDS = 0.1

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class MeshError(UserError):
    """The step cannot be compiled or read for this mesh; another one may do."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step, bytes per device."""

    text: str
    """The optimised program; empty when it was refused."""
    timed: bool
    """Whether the program has the compiler's estimated cycles."""
    machine_code: bool
    """Whether all of it was made, and its size is known."""
    total_bytes: int
    """Arguments, temporaries and code."""
    temporary_bytes: int
    """Of these, what lives during a step only; 0 when it was refused."""
    compile_seconds: float
    refused: str | None = None
    """The compiler's reason when the program does not fit the device's memory."""

    @property
    def ended(self) -> bool:
        """Whether the compiler has nothing more to say."""
        return self.machine_code or self.refused is not None


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
      MeshError: the compiler refuses it for another reason than memory.
    """
    start = time.monotonic()
    lowered, arguments = _lowered(step, batch_size, seq_len)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(error, arguments, start)
    return _compiled(compiled, start)


class Compilation:
    """A step that is compiled in a thread; ends with the process, not before."""

    def __init__(
        self,
        step: TrainStep,
        batch_size: int,
        seq_len: int,
        dump: pathlib.Path,
        log: pathlib.Path,
    ):
        """Starts it.

        Args:
          step: what `build` made.
          batch_size: sequences of one update.
          seq_len: tokens of a sequence.
          dump: folder that this process was told to dump programs to (`optimised.flags`).
          log: where its standard error goes, with what `lowering.environment` makes of it.
        """
        self._start = time.monotonic()
        self._dump = dump
        self._log = log
        lowered, self._arguments = _lowered(step, batch_size, seq_len)
        self._compiled: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def compile_it() -> None:
            try:
                self._compiled.set_result(lowered.compile())
            except Exception as error:
                self._compiled.set_exception(error)

        threading.Thread(target=compile_it, daemon=True).start()

    def optimised(self) -> CompiledStep:
        """Waits for the program without machine code; or for the end, if that comes first.

        Raises:
          MeshError: the compiler refuses it for another reason than memory.
        """
        while True:
            with contextlib.suppress(concurrent.futures.TimeoutError):
                self._compiled.exception(timeout=_POLL_SECONDS)
                return self.finished()
            found = optimised.read(self._dump)
            if found is not None:
                return _without_code(found, found.text, False, self._arguments, self._start)

    def timed(self) -> CompiledStep:
        """Waits for the estimated cycles of all operations and the machine code of all kernels; or
        for the end, if that comes first.

        Raises:
          MeshError: the compiler refuses it for another reason than memory.
        """
        found = optimised.read(self._dump)
        names = found.largest if found is not None else ()
        log = lowering.Log()
        with self._log.open(errors="replace") as lines:
            while True:
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    self._compiled.exception(timeout=_POLL_SECONDS)
                    return self.finished()
                log.read(lines.read())
                if found is not None and log.complete(names):
                    text = log.annotated(found.text)
                    return _without_code(found, text, True, self._arguments, self._start)

    def finished(self) -> CompiledStep:
        """Waits for the end.

        Raises:
          MeshError: the compiler refuses it for another reason than memory.
        """
        try:
            compiled = self._compiled.result()
        except jax.errors.JaxRuntimeError as error:
            return _refused(error, self._arguments, self._start)
        return _compiled(compiled, self._start)


def _lowered(step: TrainStep, batch_size: int, seq_len: int) -> tuple[jax.stages.Lowered, int]:
    """The step's program, and the bytes of its arguments on one device."""
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    batch = step.abstract_batch({"tokens": tokens})
    with targets.compiling_for("tpu"):
        lowered = step.step.trace(step.abstract_state, batch).lower(lowering_platforms=("tpu",))
    return lowered, device_bytes((step.abstract_state, batch))


def _compiled(compiled: Any, start: float) -> CompiledStep:
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return CompiledStep(
        compiled.as_text(),
        timed=True,
        machine_code=True,
        total_bytes=total,
        temporary_bytes=memory.temp_size_in_bytes,
        compile_seconds=time.monotonic() - start,
    )


def _without_code(
    found: optimised.Optimised, text: str, timed: bool, arguments: int, start: float
) -> CompiledStep:
    return CompiledStep(
        text,
        timed=timed,
        machine_code=False,
        total_bytes=found.total_bytes + _CODE_BYTES,
        temporary_bytes=found.total_bytes - arguments,
        compile_seconds=time.monotonic() - start,
    )


def _refused(error: Exception, arguments: int, start: float) -> CompiledStep:
    message = str(error)
    size = _needed(message, arguments)
    reason = message.strip().splitlines()[0]
    if size is None:
        raise MeshError(f"the TPU compiler refuses this step: {reason[:300]}") from error
    return CompiledStep(
        "",
        timed=False,
        machine_code=False,
        total_bytes=size,
        temporary_bytes=0,
        compile_seconds=time.monotonic() - start,
        refused=reason,
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


def check_sizes(batch_size: int, seq_len: int, accumulation: int) -> None:
    """Raises a UserError for sizes that are no sizes."""
    if batch_size < 1 or seq_len < 1 or accumulation < 1:
        raise UserError("batch size, sequence length and accumulation must be at least 1")


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
