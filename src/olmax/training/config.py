"""What determines a training run: frozen dataclasses that a command line and JSON can express."""

import dataclasses
import math
from typing import Any

from olmax.errors import UserError
from olmax.models.config import DecoderConfig, Execution
from olmax.training.objectives import NextToken
from olmax.training.optimizers import AdamWConfig
from olmax.training.schedules import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay. The last step is always written."""

    interval: int | None = 1000
    """Steps between permanent checkpoints; None: only the last one."""
    ephemeral_interval: int | None = None
    """Steps between checkpoints that only serve to resume: a newer one replaces them."""
    max_to_keep: int | None = None
    """Permanent checkpoints kept, the oldest go first; None keeps all."""
    directory: str | None = None
    """Where they go, `gs://` paths included; None: `checkpoints` in the run directory."""

    def __post_init__(self):
        for name in ("interval", "ephemeral_interval", "max_to_keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"checkpoint: {name} must be at least 1, is {value}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. With the data it names, everything that determines the result.

    Other objectives and models subclass it and narrow the types of `objective` and `model`.
    """

    model: DecoderConfig
    batch_size: int
    """Sequences of one update, all hosts together."""
    seq_len: int
    """Tokens of a sequence."""
    steps: int | None = None
    """Updates to make; or give `tokens`."""
    tokens: int | None = None
    """Tokens to train on, rounded up to whole updates."""
    execution: Execution = Execution()
    objective: NextToken = NextToken()
    optimizer: AdamWConfig = AdamWConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    accumulation: int = 1
    """Micro-batches a batch is cut into; changes memory and speed, not the result."""
    seed: int = 0
    """Of the initial parameters and of the randomness inside the steps."""
    mesh: str = "fsdp=-1"
    """Devices along the mesh axes, such as `fsdp=4,tensor=2`."""
    start_from: str | None = None
    """A checkpoint whose parameters and optimizer state the run starts from; its step count, data
    order and schedule start anew (see `olmax.training.anneal`). One that holds a model alone, such
    as `olmax upcycle` makes, starts with a fresh optimizer."""
    data: Any = None
    """Description of the training data, stored with the run."""
    log_interval: int = 10
    """Steps between progress lines; metrics are fetched from the device that often."""
    tensorboard: bool = True
    wandb_project: str | None = None
    """Weights & Biases project to log to; None does not."""
    compilation_cache: str | None = None
    """Directory in which compiled programs are kept between runs."""
    peak_flops: float | None = None
    """FLOP/s of one device for the MFU; None: from a table of accelerators."""
    allow_changes: bool = False
    """Resume a run although its stored configuration differs."""

    def __post_init__(self):
        for name in ("batch_size", "seq_len", "accumulation", "log_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, is {getattr(self, name)}")
        if (self.steps is None) == (self.tokens is None):
            raise UserError("give either steps or tokens, the length of the training")
        length = self.tokens if self.steps is None else self.steps
        if length is None or length < 1:
            raise UserError(f"the length of the training must be at least 1, is {length}")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"accumulation={self.accumulation} does not divide batch_size={self.batch_size}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update."""
        return self.batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def resolved_schedule(self) -> ScheduleConfig:
        """The schedule with its duration filled in."""
        return self.schedule.resolve(self.total_steps, self.tokens_per_step)

    def resolve(self) -> "TrainConfig":
        """The same with nothing left to be derived."""
        return dataclasses.replace(self, schedule=self.resolved_schedule)


# Fields that say how a run is executed or watched; the rest determines its result.
_NOT_DETERMINING = {
    "steps",
    "tokens",
    "execution",
    "checkpoint",
    "accumulation",
    "mesh",
    "log_interval",
    "tensorboard",
    "wandb_project",
    "compilation_cache",
    "peak_flops",
    "allow_changes",
}


def changed_fields(stored: TrainConfig, now: TrainConfig) -> list[str]:
    """Dotted names of the settings that determine the result and differ, with both values."""
    if type(stored) is not type(now):
        return [f"class {type(stored).__name__} -> {type(now).__name__}"]
    names = [field.name for field in dataclasses.fields(now) if field.name not in _NOT_DETERMINING]
    return [
        change
        for name in names
        for change in _differences(name, getattr(stored, name), getattr(now, name))
    ]


def _differences(name: str, old: Any, new: Any) -> list[str]:
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        return [
            change
            for field in dataclasses.fields(old)
            for change in _differences(
                f"{name}.{field.name}", getattr(old, field.name), getattr(new, field.name)
            )
        ]
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]
