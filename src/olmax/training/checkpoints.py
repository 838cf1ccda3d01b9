"""Writing checkpoints in the background and reading them back, on any mesh and number of hosts.

Arrays go through Orbax. What it leaves to others happens here: when a checkpoint counts as valid,
which ones stay, and whether the arrays that come back are those that were written.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from olmax import sharding
from olmax.errors import UserError
from olmax.models.config import Execution
from olmax.models.decoder import Decoder
from olmax.training import checkpoint_files as files
from olmax.training import config_json
from olmax.training.checksums import checksums
from olmax.training.config import CheckpointConfig, TrainConfig
from olmax.training.names import map_named, named_leaves
from olmax.training.step import TrainState, device_shardings


class DamagedCheckpointError(Exception):
    """A checkpoint that says it is complete but whose files are not what was written."""


class _NotFromOrbax(logging.Filter):
    """Orbax logs a traceback for errors that it also raises; the user gets the one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


class Checkpointer:
    """Writes the checkpoints of one run, one at a time, while training goes on.

    Every process of a job makes the same calls in the same order; process 0 does what must be done
    once.
    """

    def __init__(self, root: str | os.PathLike, config: CheckpointConfig):
        self.root = files.absolute(epath.Path(root))
        self.config = config
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True))
        self._thread: threading.Thread | None = None
        self._error: tuple[int, BaseException] | None = None
        self._primary = jax.process_index() == 0
        logging.getLogger("absl").addFilter(_NotFromOrbax())

    def due(self, step: int) -> str | None:
        """`permanent`, `ephemeral` or None: what is to be written after this step."""
        if self.config.interval and step % self.config.interval == 0:
            return "permanent"
        if self.config.ephemeral_interval and step % self.config.ephemeral_interval == 0:
            return "ephemeral"
        return None

    def clean(self) -> None:
        """Removes what interrupted writes and removals have left."""
        if self._primary:
            for directory in files.step_directories(self.root):
                if not (directory / files.METADATA).exists():
                    files.remove(directory)
        _barrier("olmax_checkpoints_clean")

    def save(
        self, state: TrainState, step: int, *, config: TrainConfig, loader: Any, permanent: bool
    ) -> None:
        """Starts to write a checkpoint; returns when `state` may be donated.

        Args:
          state: after `step` updates.
          step: the same as `state.step`, known without asking the device.
          config: the resolved configuration.
          loader: JSON-able state of the data loader.
          permanent: False: only until there is a newer one.

        Raises:
          UserError: this or the previous checkpoint could not be written.
        """
        self.wait()
        directory = self.root / str(step)
        arrays = named_leaves(state)
        sums = checksums(arrays)
        try:
            if self._primary:
                files.remove(directory)
                directory.mkdir(parents=True, exist_ok=True)
                config_json.dump(config, directory / files.CONFIG)
                config_json.write_text(directory / files.LOADER, json.dumps(loader))
            _barrier(f"olmax_checkpoint_{step}")
            self._orbax.save(directory / files.STATE, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            self._error = (step, error)
            self.wait()
        shapes = {name: (list(x.shape), str(x.dtype)) for name, x in arrays.items()}

        def finish():
            try:
                self._orbax.wait_until_finished()
                if self._primary:
                    described = {
                        name: {"shape": shape, "dtype": dtype, "checksum": int(sums[name])}
                        for name, (shape, dtype) in shapes.items()
                    }
                    files.write_metadata(directory, files.Metadata(step, permanent, described))
                    self._remove_superseded(step)
            except BaseException as error:
                self._error = (step, error)

        self._thread = threading.Thread(target=finish, name=f"checkpoint-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Waits until the checkpoint being written is complete.

        Raises:
          UserError: it could not be written. Its remains are gone; earlier ones are untouched.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is None:
            return
        (step, error), self._error = self._error, None
        directory = self.root / str(step)
        if self._primary:
            try:
                files.remove(directory)
            except OSError as remains:
                print(f"could not remove {directory}: {remains}", file=sys.stderr)
        valid = files.valid_checkpoints(self.root)
        newest = f"the newest complete one is {valid[-1]}" if valid else "there is no earlier one"
        raise UserError(
            f"checkpoint of step {step} could not be written to {directory}: {_reason(error)}; "
            f"{newest}; mend that and start again to continue from it"
        ) from error

    def close(self) -> None:
        """Waits for the last checkpoint and frees the threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, Any] | None:
        """The newest checkpoint that can be read: (state, loader state).

        A damaged one is reported in one line on stderr and set aside as `<step>.damaged`. None:
        there is no checkpoint.

        Args:
          abstract: shapes, dtypes and shardings to restore to.

        Raises:
          UserError: the arrays are not those of this model and optimizer, or every checkpoint is
            damaged.
        """
        found = [int(path.name) for path in files.valid_checkpoints(self.root)]
        # All processes must try the same checkpoints, whatever their view of the file system.
        count = int(_from_primary(len(found)))
        for position in range(count):
            step = int(_from_primary(found[-1 - position] if position < len(found) else 0))
            directory = self.root / str(step)
            try:
                return read_checkpoint(directory, abstract)
            except DamagedCheckpointError as error:
                _report_damage(directory, error)
                if self._primary:
                    aside = directory.parent / f"{directory.name}.damaged"
                    aside.rmtree(missing_ok=True)
                    directory.rename(aside)
                _barrier(f"olmax_damaged_{step}")
        if count:
            raise UserError(
                f"all {count} checkpoints in {self.root} are damaged; they were set aside as "
                "<step>.damaged, start again to train from the beginning"
            )
        return None

    def _remove_superseded(self, newest: int) -> None:
        """Applies `CheckpointConfig` after the checkpoint of step `newest` has become valid."""
        permanent, ephemeral = [], []
        for path in files.valid_checkpoints(self.root):
            if int(path.name) < newest:
                try:
                    kept = files.read_metadata(path).permanent
                except ValueError:
                    continue
                (permanent if kept else ephemeral).append(path)
        stay = self.config.max_to_keep
        newest_is_permanent = files.read_metadata(self.root / str(newest)).permanent
        if stay is not None:
            surplus = len(permanent) + newest_is_permanent - stay
            ephemeral += permanent[: max(surplus, 0)]
        for path in ephemeral:
            files.remove(path)


def read_checkpoint(directory: epath.Path, abstract: TrainState) -> tuple[TrainState, Any]:
    """Training state and loader state of one checkpoint.

    Raises:
      DamagedCheckpointError: see there.
      UserError: the arrays are not those that `abstract` describes.
    """
    try:
        loader = json.loads((directory / files.LOADER).read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(_reason(error)) from error
    arrays = read_arrays(directory, named_leaves(abstract))
    return map_named(lambda name, _: arrays[name], abstract), loader


def read_arrays(
    directory: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Some arrays of a checkpoint, laid out as the shardings in `wanted` say.

    Raises:
      DamagedCheckpointError: files are missing, cut short or changed.
      UserError: an array is missing or has another shape or dtype than wanted.
    """
    try:
        stored = files.read_metadata(directory).arrays
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(_reason(error)) from error
    for name, leaf in wanted.items():
        have = stored.get(name)
        if have is None:
            raise UserError(
                f"checkpoint {directory} has no {name}; model or optimizer differ from this run's"
            )
        if (tuple(have["shape"]), have["dtype"]) != (tuple(leaf.shape), str(leaf.dtype)):
            raise UserError(
                f"checkpoint {directory}: {name} is {have['dtype']}{have['shape']}, expected "
                f"{leaf.dtype}{list(leaf.shape)}; model or optimizer differ from this run's"
            )
    item = dict(wanted)
    arrays, problem = None, None
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            arrays = reader.restore(
                files.absolute(directory) / files.STATE,
                args=ocp.args.PyTreeRestore(
                    item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
        except MemoryError:
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            problem = error
    if _any_process(problem is not None):
        reason = _reason(problem) if problem is not None else "another process cannot read it"
        raise DamagedCheckpointError(reason) from problem
    assert arrays is not None
    sums = jax.device_get(checksums(arrays))
    wrong = [name for name, value in sums.items() if int(value) != stored[name]["checksum"]]
    if wrong:
        raise DamagedCheckpointError(f"the values of {wrong[0]} are not those that were written")
    return arrays


def restore_model(
    path: str, *, execution: Execution = Execution(), mesh: Mesh | None = None
) -> Decoder:
    """The model of one of our checkpoints, in `execution.param_dtype`.

    Args:
      path: a run directory or its checkpoint directory (the newest readable one), or one
        checkpoint.
      execution: how the model will be run.
      mesh: where its parameters go; None: one device.

    Raises:
      UserError: no checkpoint there, none that can be read, or it is not of a decoder.
    """
    found = files.candidates(path)
    for directory in found:
        try:
            return _read_model(directory, execution, mesh)
        except DamagedCheckpointError as error:
            _report_damage(directory, error, last=directory == found[-1])
    raise UserError(f"no checkpoint at {path} can be read; use another one")


def _read_model(directory: epath.Path, execution: Execution, mesh: Mesh | None) -> Decoder:
    config = config_json.load(directory / files.CONFIG).model
    if mesh is not None:
        sharding.check_divisible(config, mesh)
    graphdef, params = jax.eval_shape(
        lambda: nnx.split(Decoder(config, execution, rngs=nnx.Rngs(0)))
    )
    try:
        stored = files.read_metadata(directory).arrays
    except (OSError, ValueError) as error:
        raise DamagedCheckpointError(_reason(error)) from error
    where = named_leaves(device_shardings(params, mesh, sharding.DEFAULT_RULES))

    def as_stored(name, leaf):
        dtype = stored.get(f"params.{name}", {}).get("dtype", leaf.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=where[name])

    wanted = {
        f"params.{name}": as_stored(name, leaf) for name, leaf in named_leaves(params).items()
    }
    arrays = read_arrays(directory, wanted)

    # One at a time, so that the model is never held twice.
    def take(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return arrays.pop(f"params.{name}").astype(leaf.dtype)

    return nnx.merge(graphdef, map_named(take, params))


def _report_damage(directory: epath.Path, error: Exception, last: bool = False) -> None:
    then = "" if last else "; using the previous one"
    print(f"checkpoint {directory} is damaged ({error}){then}", file=sys.stderr)


def _reason(error: BaseException) -> str:
    """The telling line of an error from far below."""
    text = " ".join(str(error).split())
    for cause in ("No space left on device", "File too large", "Disk quota exceeded"):
        if cause in text:
            return cause.lower()
    return text[:200] or type(error).__name__


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _from_primary(value: int) -> int:
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(jnp.asarray(value, jnp.int32)))


def _any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(jnp.asarray(flag)).any())
