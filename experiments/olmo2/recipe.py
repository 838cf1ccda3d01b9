"""What an OLMo 2 recipe consists of: two stages of training, a soup, and how they are judged.

A recipe is one frozen dataclass; the command line overrides any of its fields with dots.
"""

import dataclasses
import math

from experiments.embedded import Corpus
from olmax.errors import UserError
from olmax.training.config import TrainConfig
from olmax.training.schedules import ScheduleConfig, learning_rate


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One annealing run of stage 2."""

    seed: int
    """Of the data order; ingredients of one mix differ in nothing else."""
    steps: int
    """Updates until the learning rate has fallen to zero."""
    mix: str
    """Mixture it trains on."""
    steps_at_zero: int = 0
    """Further updates at learning rate zero (the released 1B to 13B runs made ten; they change
    nothing)."""
    souped: bool = True
    """Whether it enters the soup."""


@dataclasses.dataclass(frozen=True)
class Anneal:
    """Stage 2: every ingredient starts from the same pretraining checkpoint with its optimizer
    state, at the learning rate found there, without warm-up, and falls linearly to zero.
    """

    ingredients: tuple[Ingredient, ...]
    batch_size: int
    """Sequences of one update."""
    learning_rate_step: int | None = None
    """Pretraining step whose learning rate stage 2 begins with; None: the last one. Parameters and
    optimizer state are those of the last step in any case."""


@dataclasses.dataclass(frozen=True)
class Microanneal:
    """Short annealing runs on small mixes, to judge a source before it enters the big one."""

    mixes: tuple[str, ...] = ()
    """One run each."""
    steps: int = 40
    seed: int = 7201


@dataclasses.dataclass(frozen=True)
class Stability:
    """The study of initialisation: growth over depth at several widths, OLMo 2's initialisation
    against OLMo-0424's scaled one.
    """

    widths: tuple[int, ...] = (128, 256, 512)
    layers: int = 8
    documents: int = 50
    """Random documents that the exponents are averaged over."""
    seed: int = 12536


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How models of a recipe are compared."""

    documents: int = 16
    """Held-out documents of each source for bits per byte."""
    document_bytes: int = 2000
    """Length that held-out documents are cut to."""
    questions: int = 120
    """Questions of each benchmark task."""
    shots: int = 2
    """Solved examples before each arithmetic question."""
    sample_tokens: int = 48
    """Length of the samples in the report."""
    every: int = 0
    """Steps of training between looks at the held-out text (a part of it); 0: none."""
    seed: int = 0
    """Of the choice of questions and wrong answers."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Pretraining, annealing, soup and evaluation of one model."""

    name: str
    pretrain: TrainConfig
    anneal: Anneal
    pretrain_mix: str = "pretrain"
    """Mixture of stage 1."""
    data_seed: int = 0
    """Of the data order of stage 1."""
    repetition_filter: bool = True
    """Leave sequences with a token n-gram repeated 32 times out of the loss (n up to 13)."""
    corpus: Corpus | None = None
    """The embedded corpus; None: prepared data must be given in `data`."""
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    """Directories of prepared data by mixture, for recipes that do not embed theirs."""
    evaluation: Evaluation = Evaluation()
    microanneal: Microanneal = Microanneal()
    stability: Stability = Stability()
    run_dir: str = ""
    """Where results go; empty: `runs/olmo2-<name>`."""
    published: str | None = None
    """Row of published.json that this recipe trains."""
    notes: tuple[str, ...] = ()
    """Where paper, released configuration and what ran differ, and what stands here."""

    @property
    def directory(self) -> str:
        """Where results go."""
        return self.run_dir or f"runs/{self.name}"

    @property
    def pretrain_tokens(self) -> int:
        """Tokens of stage 1."""
        return self.pretrain.total_steps * self.pretrain.tokens_per_step

    def ingredient_tokens(self, ingredient: Ingredient) -> int:
        """Tokens of one annealing run, those at learning rate zero included."""
        steps = ingredient.steps + ingredient.steps_at_zero
        return steps * self.anneal.batch_size * self.pretrain.seq_len

    @property
    def model_tokens(self) -> int:
        """Tokens behind the final model: stage 1 and what is souped (or the first ingredient)."""
        souped = [i for i in self.anneal.ingredients if i.souped] or self.anneal.ingredients[:1]
        return self.pretrain_tokens + sum(self.ingredient_tokens(i) for i in souped)

    def anneal_peak(self) -> float:
        """Learning rate that stage 2 begins with, from the schedule of stage 1."""
        step = self.anneal.learning_rate_step or self.pretrain.total_steps
        schedule = self.pretrain.resolved_schedule
        return float(learning_rate(schedule, step, self.pretrain.tokens_per_step))

    def anneal_schedule(self, ingredient: Ingredient) -> ScheduleConfig:
        """Straight line from `anneal_peak` to zero."""
        return ScheduleConfig(
            kind="linear", peak=self.anneal_peak(), duration=ingredient.steps, units="steps"
        )

    def check(self) -> None:
        """Checks what single fields cannot know of each other.

        Raises:
          UserError: no ingredients, two alike, or a step beyond pretraining.
        """
        ingredients = self.anneal.ingredients
        if not ingredients:
            raise UserError("anneal.ingredients: give at least one annealing run")
        names = [ingredient_name(number) for number in range(len(ingredients))]
        orders = {(i.seed, i.mix, i.steps) for i in ingredients}
        if len(orders) < len(ingredients):
            raise UserError(
                f"anneal.ingredients: two of {', '.join(names)} have the same seed, mix and steps; "
                "they would be the same model"
            )
        step, last = self.anneal.learning_rate_step, self.pretrain.total_steps
        if step and step > last:
            raise UserError(
                f"anneal.learning_rate_step={step} lies after the last pretraining step {last}"
            )


def ingredient_name(number: int) -> str:
    """`ingredient1`, ..., as the released branches count them."""
    return f"ingredient{number + 1}"


def tokens_to_steps(tokens: float, batch_size: int, seq_len: int) -> int:
    """Whole updates nearest to a token budget, as the released configurations round it."""
    return math.floor(tokens / (batch_size * seq_len) + 0.5)
