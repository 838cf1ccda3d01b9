"""The training loop: one for every objective."""

import contextlib
import json
import math
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from olmax import sharding
from olmax.errors import UserError
from olmax.models.config import DecoderConfig
from olmax.models.decoder import Decoder
from olmax.training import checkpoint_files, config_json
from olmax.training.checkpoints import Checkpointer, DamagedCheckpointError, read_arrays
from olmax.training.config import TrainConfig, changed_fields
from olmax.training.names import map_named, named_leaves
from olmax.training.progress import Progress
from olmax.training.recorder import JsonLines, TensorBoard, WeightsAndBiases, Writer
from olmax.training.run_directory import locked
from olmax.training.signals import Stopped, StopRequest, stop_requests
from olmax.training.step import TrainState, TrainStep, make_train_step
from olmax.training.throughput import mfu, peak_flops


class Loader(Protocol):
    """A source of batches that knows where it stands."""

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """This host's rows of one batch after another, from where the loader stands."""
        ...

    def get_state(self) -> Any:
        """JSON-able; the same on every host, and valid on any number of hosts."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes to where `get_state` was called."""
        ...


EvaluationFn = Callable[[nnx.Module], Mapping[str, float]]


class Evaluator(NamedTuple):
    """An evaluation during training, also after the last step."""

    name: str
    every: int
    """Steps between evaluations."""
    fn: EvaluationFn
    """Metrics of the model; must not keep it, its arrays are reused by the next step."""


class Result(NamedTuple):
    """What training leaves in memory."""

    model: nnx.Module
    step: int


class Trainer:
    """Trains a model in a run directory, and continues what it finds there.

    The directory gets `config.json`, `metrics.jsonl` (a row a step; evaluations in rows of their
    own, under `<evaluator>/<metric>`), `tensorboard/` and `checkpoints/`.
    """

    def __init__(
        self,
        config: TrainConfig,
        loader: Loader,
        run_directory: str | os.PathLike,
        *,
        mesh: Mesh | None = None,
        evaluators: Sequence[tuple[str, int, EvaluationFn]] = (),
        initial: nnx.Module | None = None,
        build: Callable[[nnx.Rngs], nnx.Module] | None = None,
        flops_per_token: float | None = None,
        show_progress: bool = True,
    ):
        """Prepares training; nothing is computed or written yet.

        Args:
          config: the run.
          loader: batches of `config.batch_size` rows, divided over the hosts.
          run_directory: a local directory.
          mesh: where to train; None: `config.mesh` over all devices.
          evaluators: see `Evaluator`.
          initial: starts from this model's parameters, which are donated, with a fresh optimizer.
          build: makes the model; None: the decoder of `config.model`.
          flops_per_token: for the MFU; None: the decoder's matrix products.
          show_progress: whether to print on stderr.

        Raises:
          UserError: a configuration that does not fit the devices or itself.
        """
        self.config = config.resolve()
        self.loader = loader
        self.run_directory = pathlib.Path(run_directory)
        self.evaluators = [Evaluator(*evaluator) for evaluator in evaluators]
        self.initial = initial
        self.mesh = sharding.make_mesh(config.mesh) if mesh is None else mesh
        if "://" in str(run_directory):
            raise UserError(
                f"run directory {run_directory} must be local; only checkpoint.directory may be "
                "remote"
            )
        rows = config.batch_size // config.accumulation
        if rows % sharding.batch_shards(self.mesh) or config.batch_size % jax.process_count():
            raise UserError(
                f"batch_size={config.batch_size} in {config.accumulation} micro-batches cannot be "
                f"divided over {sharding.batch_shards(self.mesh)} devices; choose a multiple of "
                f"{config.accumulation * sharding.batch_shards(self.mesh)}"
            )
        if build is None:
            sharding.check_divisible(config.model, self.mesh)
        self.train_step = train_step(self.config, self.mesh, build)
        if flops_per_token is None and isinstance(config.model, DecoderConfig):
            flops_per_token = config.model.matmul_flops_per_token(config.seq_len)
        peak = config.peak_flops or peak_flops(self.mesh.devices.flat[0])
        self._mfu_of_one_token_per_second = (
            mfu(flops_per_token, 1.0, peak * self.mesh.size) if peak and flops_per_token else None
        )
        self._primary = jax.process_index() == 0
        self._show_progress = show_progress and self._primary

    def fit(self) -> Result:
        """Trains to the end, from the newest checkpoint of the run directory if there is one.

        Raises:
          UserError: another process writes the run directory, the stored configuration differs,
            the data ends early, the loss is not finite, or the disk is full.
          Stopped: SIGTERM or Ctrl-C; a checkpoint has been written, and calling `fit` again (in a
            new process) continues.
        """
        if self.config.compilation_cache:
            jax.config.update("jax_compilation_cache_dir", self.config.compilation_cache)
            # Anything compiled before has fixed that there is no cache.
            compilation_cache.reset_cache()
        with contextlib.ExitStack() as stack:
            if self._primary:
                stack.enter_context(locked(self.run_directory))
            request = stack.enter_context(stop_requests())
            run = _Run(self, stack)
            return run.train(request)


def train_step(
    config: TrainConfig, mesh: Mesh, build: Callable[[nnx.Rngs], nnx.Module] | None = None
) -> TrainStep:
    """State shapes, shardings and the jitted step of a run, without computing anything.

    Args:
      config: the run.
      mesh: devices, which need not be there if the step is only compiled.
      build: makes the model; None: the decoder of `config.model`.
    """
    config = config.resolve()
    return make_train_step(
        build or (lambda rngs: Decoder(config.model, config.execution, rngs=rngs)),
        config.objective,
        config.optimizer,
        config.schedule,
        tokens_per_step=config.tokens_per_step,
        accumulation=config.accumulation,
        seed=config.seed,
        mesh=mesh if mesh.size > 1 or mesh.devices.flat[0] != jax.devices()[0] else None,
    )


class _Run:
    """One call of `fit`: the open files, and where training stands."""

    def __init__(self, trainer: Trainer, stack: contextlib.ExitStack):
        self.trainer = trainer
        self.config = trainer.config
        self.directory = trainer.run_directory
        self.checkpointer = Checkpointer(
            self.config.checkpoint.directory or self.directory.absolute() / "checkpoints",
            self.config.checkpoint,
        )
        stack.callback(self.checkpointer.close)
        self._check_stored_config()
        self.state, self.step = self._start()
        self.saved_step = self.step
        self.progress = Progress(self.config.total_steps, self.step, enabled=trainer._show_progress)
        stack.callback(self.progress.close)
        self.writers: list[Writer] = []
        if trainer._primary:
            config_json.dump(self.config, self._config_path)
            self.writers.append(JsonLines(self.directory, self.step))
            if self.config.tensorboard:
                self.writers.append(TensorBoard(self.directory, self.step))
            if self.config.wandb_project:
                described = config_json.to_json(self.config)
                self.writers.append(
                    WeightsAndBiases(self.directory, self.config.wandb_project, described)
                )
        for writer in self.writers:
            stack.callback(writer.close)
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.clock: float | None = None
        self.clock_step = self.step

    @property
    def _config_path(self) -> pathlib.Path:
        return self.directory / checkpoint_files.CONFIG

    def _check_stored_config(self) -> None:
        if not self._config_path.exists() or self.config.allow_changes:
            return
        if not checkpoint_files.valid_checkpoints(self.checkpointer.root):
            return
        stored = config_json.load(self._config_path)
        now = config_json.from_json(json.loads(json.dumps(config_json.to_json(self.config))))
        if changes := changed_fields(stored, now):
            raise UserError(
                f"run directory {self.directory} was made with another configuration "
                f"({'; '.join(changes)}); use another directory, or allow_changes to continue it"
            )

    def _start(self) -> tuple[TrainState, int]:
        """The state to continue from and its step; the loader is put in its place."""
        train_step = self.trainer.train_step
        self.checkpointer.clean()
        restored = self.checkpointer.restore_newest(train_step.abstract_state)
        if restored is not None:
            state, loader_state = restored
            self.trainer.loader.set_state(loader_state)
            return state, int(state.step)
        if self.config.start_from is not None:
            return _start_from(self.config.start_from, train_step, self.config.seed), 0
        if self.trainer.initial is not None:
            params = nnx.split(self.trainer.initial)[1]
            return train_step.adopt(params), 0
        return train_step.initialize(), 0

    def train(self, request: StopRequest) -> Result:
        """The loop."""
        total, config = self.config.total_steps, self.config
        if self.step:
            self.progress.say(f"continuing {self.directory} from step {self.step} of {total}")
        batches = iter(self.trainer.loader)
        while self.step < total:
            if self._stop_wanted(request):
                number = request.signal_number or signal.SIGTERM
                self._stop(number)
            batch = self._next(batches)
            self.state, metrics = self.trainer.train_step.step(
                self.state, self.trainer.train_step.place(batch)
            )
            self.step += 1
            self.pending.append((self.step, metrics))
            if self.clock is None:
                # Compilation is over when the first step is.
                jax.block_until_ready(metrics)
                self.clock, self.clock_step = time.monotonic(), self.step
            last = self.step == total
            if self.step % config.log_interval == 0 or last:
                self._log()
            for evaluator in self.trainer.evaluators:
                if self.step % evaluator.every == 0 or last:
                    self._evaluate(evaluator)
            if last or self.checkpointer.due(self.step):
                self._save(permanent=last or self.checkpointer.due(self.step) == "permanent")
        if self.saved_step != total:
            raise UserError(
                f"run directory {self.directory} is at step {self.step}, past the {total} steps "
                "asked for"
            )
        self.checkpointer.wait()
        return Result(self.trainer.train_step.model(self.state.params), self.step)

    def _next(self, batches: Iterator[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
        try:
            batch = next(batches)
        except StopIteration:
            raise UserError(
                f"the data ended after step {self.step} of {self.config.total_steps}; give more "
                "data, repeat it, or train for fewer steps"
            ) from None
        rows = self.config.batch_size // jax.process_count()
        for name, array in batch.items():
            if array.shape[0] != rows or (
                name == "tokens" and array.shape[1] != self.config.seq_len
            ):
                raise UserError(
                    f"the loader gave {name} of shape {array.shape}, the configuration says "
                    f"batch_size={self.config.batch_size} over {jax.process_count()} hosts and "
                    f"seq_len={self.config.seq_len}"
                )
        return batch

    def _log(self) -> None:
        rows = self._fetch()
        now = time.monotonic()
        assert self.clock is not None
        steps, seconds = self.step - self.clock_step, now - self.clock
        speed = steps * self.config.tokens_per_step / seconds if steps else None
        per_token = self.trainer._mfu_of_one_token_per_second
        used = speed * per_token if speed is not None and per_token is not None else None
        rows[-1] |= {"tokens_per_second": speed}
        if per_token is not None:
            rows[-1] |= {"mfu": used}
        self._write(rows)
        self.progress.update(self.step, rows[-1]["loss"], speed, used)
        self.clock, self.clock_step = time.monotonic(), self.step

    def _fetch(self) -> list[dict[str, Any]]:
        """Rows of the steps since the last fetch; waits for the device.

        Raises:
          UserError: a loss is not finite and the step was not skipped.
        """
        pending, self.pending = self.pending, []
        rows = []
        for step, metrics in jax.device_get(pending):
            row = {"step": step, "tokens": step * self.config.tokens_per_step}
            row |= {name: float(value) for name, value in metrics.items()}
            rows.append(row)
            if not math.isfinite(row["loss"]) and not row.get("skipped"):
                self._write(rows)
                self.checkpointer.wait()
                valid = checkpoint_files.valid_checkpoints(self.checkpointer.root)
                newest = f"newest checkpoint: {valid[-1]}" if valid else "no checkpoint"
                raise UserError(
                    f"the loss is {row['loss']} at step {step} ({newest}); lower schedule.peak or "
                    "set optimizer.skip_step.enabled, in another run directory or with "
                    "allow_changes"
                )
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        for writer in self.writers:
            writer.write(rows)

    def _evaluate(self, evaluator: Evaluator) -> None:
        self._write(self._fetch())
        began = time.monotonic()
        model = self.trainer.train_step.model(self.state.params)
        values = {f"{evaluator.name}/{k}": float(v) for k, v in evaluator.fn(model).items()}
        self._write([{"step": self.step} | values])
        self.progress.say(
            f"step {self.step}  " + "  ".join(f"{name} {v:.4f}" for name, v in values.items())
        )
        assert self.clock is not None
        self.clock += time.monotonic() - began

    def _save(self, *, permanent: bool) -> None:
        # Rows first: whatever a valid checkpoint has seen is in the files. And a checkpoint of
        # parameters that are not finite must not replace a good one.
        self._write(self._fetch())
        began = time.monotonic()
        self.checkpointer.save(
            self.state,
            self.step,
            config=self.config,
            loader=self.trainer.loader.get_state(),
            permanent=permanent,
        )
        self.saved_step = self.step
        assert self.clock is not None
        self.clock += time.monotonic() - began

    def _stop_wanted(self, request: StopRequest) -> bool:
        if jax.process_count() == 1:
            return request.signal_number is not None
        # Hosts hear of a preemption at different times; they agree on a step to stop at.
        return multihost_utils.reached_preemption_sync_point(self.step)

    def _stop(self, signal_number: int) -> None:
        if self.step != self.saved_step:
            self._save(permanent=False)
        self.checkpointer.wait()
        self.progress.say(f"stopped at step {self.step}; run again to continue")
        raise Stopped(signal_number)


def _start_from(path: str, train_step: TrainStep, seed: int) -> TrainState:
    """Parameters and optimizer state of a checkpoint; step and seed of a new run.

    A checkpoint that holds a model alone (an upcycled one, say) starts with a fresh optimizer.
    """
    directory = checkpoint_files.candidates(path)[0]
    prefixes = ("params.", "opt_state.")
    if checkpoint_files.holds_model_only(directory):
        prefixes = ("params.",)
    wanted = {
        name: leaf
        for name, leaf in named_leaves(train_step.abstract_state).items()
        if name.startswith(prefixes)
    }
    try:
        arrays = read_arrays(directory, wanted)
    except DamagedCheckpointError as error:
        raise UserError(
            f"start_from={path} is damaged ({error}); use another checkpoint"
        ) from error
    abstract = train_step.abstract_state
    if len(prefixes) == 1:
        return train_step.adopt(
            map_named(lambda name, _: arrays[f"params.{name}"], abstract.params)
        )
    # Step and seed go where the step puts its own; else the second update is compiled anew.
    return TrainState(
        step=jax.device_put(np.int32(0), abstract.step.sharding),
        seed=jax.device_put(np.uint32(seed), abstract.seed.sharding),
        params=map_named(lambda name, _: arrays[f"params.{name}"], abstract.params),
        opt_state=map_named(lambda name, _: arrays[f"opt_state.{name}"], abstract.opt_state),
    )
