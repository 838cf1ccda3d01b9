"""A run small enough to be made many times, and the same as a program that can be killed."""

import dataclasses
import sys
import time

import jax
import numpy as np

from olmax import sharding
from olmax.models import DecoderConfig
from olmax.training.config import CheckpointConfig, TrainConfig
from olmax.training.schedules import ScheduleConfig
from olmax.training.trainer import Trainer

MODEL = DecoderConfig(
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    head_dim=8,
    d_ff=32,
    vocab_size=64,
    max_seq_len=16,
)
CONFIG = TrainConfig(
    model=MODEL,
    batch_size=4,
    seq_len=16,
    steps=12,
    schedule=ScheduleConfig(peak=1e-2, warmup=2, duration=40, final_fraction=0.1),
    checkpoint=CheckpointConfig(interval=6, ephemeral_interval=2),
    log_interval=3,
    tensorboard=False,
)


class CountingLoader:
    """Batches made of a seed and a position; batch n is the same whenever it is asked for."""

    def __init__(self, config: TrainConfig, seed: int = 0, delay: float = 0.0):
        self.config = config
        self.seed = seed
        self.delay = delay
        self.position = 0

    def __iter__(self):
        while True:
            rng = np.random.default_rng((self.seed, self.position))
            self.position += 1
            shape = (self.config.batch_size, self.config.seq_len)
            low = rng.integers(0, self.config.model.vocab_size // 2)
            time.sleep(self.delay)
            yield {"tokens": (low + rng.integers(0, 8, shape)).astype(np.int32)}

    def get_state(self):
        return {"position": self.position, "seed": self.seed}

    def set_state(self, state):
        self.position, self.seed = state["position"], state["seed"]


def one_device():
    """A mesh of the first device."""
    return sharding.make_mesh(devices=jax.devices()[:1])


def trainer(directory, config: TrainConfig = CONFIG, **changes) -> Trainer:
    """A quiet trainer of `config` on one device."""
    changes = {"mesh": one_device(), "show_progress": False} | changes
    loader = changes.pop("loader", None) or CountingLoader(config)
    return Trainer(config, loader, directory, **changes)


def main(directory: str, steps: int, delay: float, cache: str) -> None:
    """Trains `steps` steps, waiting `delay` seconds for every batch."""
    config = dataclasses.replace(CONFIG, steps=steps, compilation_cache=cache)
    Trainer(config, CountingLoader(config, delay=delay), directory).fit()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
