"""Learning-rate schedules.

One function gives the rate at any step, in float64 on the host (numpy, Python numbers) and in
float32 inside `jit`, so logs, checks and the compiled step agree.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from olmax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a function of the update number (the first update is number 1)."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After a linear warm-up from 0, `cosine`: half a cosine from the peak to `final_fraction` of
    it; `linear`: a straight line to it; `constant`: the peak; `wsd`: the peak, then a straight line
    over the last `decay`. Past `duration` the last value stays."""
    peak: float = 3e-4
    """Highest learning rate."""
    warmup: float = 0
    """Length of the warm-up."""
    duration: float | None = None
    """Where the schedule ends, warm-up included; None: where training ends. OLMo 2's cosine is cut
    short by giving a longer one (5e12 tokens for 3.9e12 trained)."""
    final_fraction: float = 0.0
    """Last learning rate as a fraction of the peak (OLMo 2's cosine: 0.1)."""
    decay: float = 0
    """Length of the final decay of `wsd`."""
    units: Literal["steps", "tokens"] = "steps"
    """What `warmup`, `duration` and `decay` count."""

    def __post_init__(self):
        if self.peak < 0 or self.warmup < 0 or self.decay < 0:
            raise UserError("schedule: peak, warmup and decay must not be negative")
        if self.duration is not None and self.duration <= 0:
            raise UserError(f"schedule: duration must be positive, is {self.duration}")
        if self.duration is not None and self.warmup + self.decay > self.duration:
            raise UserError(
                f"schedule: warmup={self.warmup} and decay={self.decay} are longer than "
                f"duration={self.duration}"
            )
        if self.kind == "wsd" and not self.decay:
            raise UserError("schedule: kind wsd needs decay, the length of its final decay")

    def resolve(self, total_steps: int, tokens_per_step: int) -> "ScheduleConfig":
        """The same with `duration` filled in."""
        if self.duration is not None:
            return self
        per_step = tokens_per_step if self.units == "tokens" else 1
        return dataclasses.replace(self, duration=total_steps * per_step)


def learning_rate(config: ScheduleConfig, step: Any, tokens_per_step: int = 1) -> Any:
    """Learning rate of update number `step`.

    Args:
      config: a schedule with a duration (see `ScheduleConfig.resolve`); `constant` needs none.
      step: a number or array; float64 results for host values, float32 for jax arrays.
      tokens_per_step: tokens of one update, for schedules in tokens.

    Raises:
      ValueError: the schedule has no duration.
    """
    xp, dtype = (jnp, jnp.float32) if isinstance(step, jax.Array) else (np, np.float64)
    # Lengths are brought to steps on the host: a token count has more digits than float32.
    per_step = tokens_per_step if config.units == "tokens" else 1
    t = xp.asarray(step).astype(dtype)
    rate = xp.full_like(t, config.peak)
    if config.kind != "constant":
        if config.duration is None:
            raise ValueError(f"schedule {config.kind} without a duration; call resolve() first")
        decay = config.decay if config.kind == "wsd" else config.duration - config.warmup
        start, length = (config.duration - decay) / per_step, decay / per_step
        fraction = xp.clip((t - start) / length, 0.0, 1.0) if length else xp.ones_like(t)
        cosine = config.kind == "cosine"
        remaining = (1 + xp.cos(np.pi * fraction)) / 2 if cosine else 1 - fraction
        floor = config.peak * config.final_fraction
        rate = floor + (config.peak - floor) * remaining
    if config.warmup:
        warmup = config.warmup / per_step
        rate = xp.where(t < warmup, config.peak * t / warmup, rate)
    return rate
