"""Mid-training: from a checkpoint with its optimizer state, linearly to a learning rate of zero.

specs/olmo2.md section 5: new data in a new order, no warm-up, everything else as in pretraining.
Microanneals are the same on smaller mixes.
"""

import dataclasses
from typing import Any

from olmax.errors import UserError
from olmax.training import checkpoint_files, config_json
from olmax.training.config import TrainConfig
from olmax.training.schedules import ScheduleConfig, learning_rate


def learning_rate_at(checkpoint: str) -> float:
    """Learning rate of the update that led to a checkpoint, from its own step and schedule.

    Args:
      checkpoint: a run directory (its newest checkpoint) or one checkpoint.

    Raises:
      UserError: no checkpoint there.
    """
    directory = checkpoint_files.candidates(checkpoint)[0]
    return _learning_rate(directory, _stored_config(directory))


def _stored_config(directory) -> TrainConfig:
    config = config_json.load(directory / checkpoint_files.CONFIG)
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"checkpoint {directory} holds a model only; annealing needs one that training wrote, "
            "with optimizer state and schedule"
        )
    return config


def _learning_rate(directory, config: TrainConfig) -> float:
    try:
        step = checkpoint_files.read_metadata(directory).step
    except ValueError as error:
        raise UserError(f"checkpoint {directory} is damaged ({error}); use another one") from error
    return float(learning_rate(config.resolved_schedule, step, config.tokens_per_step))


def anneal_config(
    checkpoint: str,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    seed: int,
    data: Any = None,
    zero_at: float | None = None,
    peak: float | None = None,
    **changes: Any,
) -> TrainConfig:
    """Configuration of an annealing run from a checkpoint of ours.

    Args:
      checkpoint: a run directory (its newest checkpoint) or one checkpoint; the result names the
        one that was found.
      steps: updates, or give `tokens`.
      tokens: budget in tokens.
      seed: of the new data order and of the steps.
      data: description of the new data.
      zero_at: step at which the learning rate reaches zero, where it stays; None: the last. (The
        released 7B reached it at step 11921 and made ten more.)
      peak: learning rate to start from; None: the one found in the checkpoint.
      **changes: other fields of the checkpoint's configuration to change.

    Raises:
      UserError: no checkpoint there.
    """
    directory = checkpoint_files.candidates(checkpoint)[0]
    config = _stored_config(directory)
    start = _learning_rate(directory, config) if peak is None else peak
    return dataclasses.replace(
        config,
        start_from=str(directory),
        steps=steps,
        tokens=tokens,
        seed=seed,
        data=data,
        schedule=ScheduleConfig(kind="linear", peak=start, duration=zero_at),
        **changes,
    ).resolve()
