"""What an OLMoE recipe consists of: one training run, variants of its model, and how they are
judged.

A recipe is one frozen dataclass; the command line overrides any of its fields with dots.
"""

import dataclasses

from experiments.embedded import Corpus
from olmax.errors import UserError
from olmax.models.config import DecoderConfig
from olmax.training.config import TrainConfig
from olmax.training.schedules import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model trained beside the main one: same tokens in the same order, same everything else."""

    name: str
    model: DecoderConfig
    load_balance: float | None = None
    """Weight of the load-balancing loss; None: the main run's."""


@dataclasses.dataclass(frozen=True)
class Anneal:
    """What follows pretraining: the last learning rate to zero on a new shuffle of the same mix."""

    steps: int
    seed: int
    peak: float
    """Learning rate it starts with, without warm-up."""

    @property
    def schedule(self) -> ScheduleConfig:
        """Straight line from `peak` to zero."""
        return ScheduleConfig(kind="linear", peak=self.peak, duration=self.steps, units="steps")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How models are compared, and what the routing analysis reads."""

    documents: int = 24
    """Held-out documents of each source."""
    document_bytes: int = 2000
    """Length that they are cut to."""
    every: int = 0
    """Steps of training between looks at a part of them; 0: none."""
    routing_tokens: int = 8192
    """Tokens of each source in the routing analysis."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A mixture of experts, and the variants that it is compared with."""

    name: str
    train: TrainConfig
    """The main model's run."""
    variants: tuple[Variant, ...] = ()
    mix: str = "pretrain"
    """Mixture that all train on."""
    data_seed: int = 0
    """Of the data order."""
    anneal: Anneal | None = None
    """Of the published recipe; the miniature's schedule ends where pretraining does."""
    repetition_filter: bool = True
    """Leave sequences with a token n-gram repeated 32 times out of the loss (n up to 13)."""
    corpus: Corpus | None = None
    """The embedded corpus; None: the recipe is one to read (`--dry-run`) or to give `data` to."""
    data: str | None = None
    """Directory of prepared data, for recipes that do not embed theirs."""
    evaluation: Evaluation = Evaluation()
    run_dir: str = ""
    """Where results go; empty: `runs/<name>`."""
    notes: tuple[str, ...] = ()
    """Where paper, configuration and what ran differ, and what stands here."""

    @property
    def directory(self) -> str:
        """Where results go."""
        return self.run_dir or f"runs/{self.name}"

    @property
    def tokens(self) -> int:
        """Tokens of pretraining."""
        return self.train.total_steps * self.train.tokens_per_step

    @property
    def anneal_tokens(self) -> int:
        """Tokens of annealing."""
        return 0 if self.anneal is None else self.anneal.steps * self.train.tokens_per_step

    def runs(self) -> dict[str, TrainConfig]:
        """Every training run by name, the main one first."""
        found = {MAIN: self.train}
        for variant in self.variants:
            router = self.train.objective.router
            if variant.load_balance is not None:
                router = dataclasses.replace(router, load_balance=variant.load_balance)
            objective = dataclasses.replace(self.train.objective, router=router)
            # Only the main run's checkpoints are looked at again.
            checkpoint = dataclasses.replace(self.train.checkpoint, interval=None)
            found[variant.name] = dataclasses.replace(
                self.train, model=variant.model, objective=objective, checkpoint=checkpoint
            )
        return found

    def check(self) -> None:
        """Checks what single fields cannot know of each other.

        Raises:
          UserError: a dense main model, or two variants of one name.
        """
        if self.train.model.moe is None:
            raise UserError("train.model.moe: the main model of an OLMoE recipe has experts")
        names = [MAIN, *(variant.name for variant in self.variants)]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"variants: two are called {name!r}")


MAIN = "moe"
"""Name of the main run."""
