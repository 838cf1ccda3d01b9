"""The stages of a run directory live in `experiments.stages`, where all experiments find them."""

from experiments.stages import Stages

__all__ = ["Stages"]
