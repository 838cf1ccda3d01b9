"""Ladders by name. A preset's docstring gives the command and what to expect of it."""

import dataclasses
import difflib
from collections.abc import Callable

from experiments.ladder.recipe import (
    BATCH_DIVISOR,
    EXTRA_STEPS,
    LADDER_LENGTHS,
    LADDER_SIZES,
    Rung,
)
from experiments.olmo2.recipe import Anneal, Corpus, Ingredient, Recipe
from olmax.errors import UserError
from olmax.models.config import Execution
from olmax.scaling.compute import PADDED_VOCAB, SIZES, ModelShape
from olmax.training.config import CheckpointConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of one size of a ladder; the vocabulary and the context are the ladder's."""

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Runs to train and fit, a larger one to predict, what they train on and are judged by."""

    name: str
    sizes: tuple[Size, ...]
    lengths: tuple[float, ...]
    """Every size is trained at each of them; multiples of 20 tokens per parameter."""
    target: Size
    """What is predicted, and trained after the prediction has been written."""
    target_length: float
    vocab_size: int = PADDED_VOCAB
    seq_len: int = 4096
    batch_divisor: int = BATCH_DIVISOR
    """Sequences that a batch is a multiple of."""
    extra_steps: int = EXTRA_STEPS
    """Updates after the end of the schedule."""
    evaluations: int | None = None
    """Evaluations of each run, at most; None: at the steps of the released runs."""
    mix: str = "olmoe_mix_0924"
    """What all runs train on."""
    corpus: Corpus | None = None
    """The embedded corpus; None: prepared data must be given in `data`."""
    data: str = ""
    """Directory of prepared data, for ladders that do not embed theirs."""
    requests: tuple[str, ...] = ()
    """Request files of the tasks, likewise."""
    questions: int = 0
    """Questions of each task of the embedded suite."""
    last: int = 5
    """Checkpoints averaged into a run's final values."""
    resamples: int = 1000
    """Resamples of the runs behind the intervals."""
    seed: int = 6198
    """Of initial parameters and data order, for all runs."""
    execution: Execution = Execution()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: str = "fsdp=-1"
    """Devices along the mesh axes."""
    topology: str = ""
    """TPU slice that a dry run plans for; empty: none."""
    run_dir: str = ""
    """Where results go; empty: `runs/ladder-<name>`."""

    @property
    def directory(self) -> str:
        """Where results go."""
        return self.run_dir or f"runs/ladder-{self.name}"

    def rungs(self) -> list[Rung]:
        """The runs that are fitted, by size and then length."""
        return [self._rung(size, length) for size in self.sizes for length in self.lengths]

    def target_rung(self) -> Rung:
        """The run that is predicted."""
        return self._rung(self.target, self.target_length)

    def _rung(self, size: Size, length: float) -> Rung:
        shape = ModelShape(
            size.d_model, size.n_layers, size.n_heads, size.d_ff, self.vocab_size, self.seq_len
        )
        return Rung(
            size.name, shape, length, self.batch_divisor, self.extra_steps, self.evaluations
        )

    def check(self) -> None:
        """Checks what single fields cannot know of each other.

        Raises:
          UserError: two runs alike, or a ladder that the target is not above.
        """
        rungs = self.rungs()
        names = [rung.name for rung in rungs]
        if not rungs:
            raise UserError("a ladder needs sizes and lengths; give at least one of each")
        if len(set(names)) < len(names):
            raise UserError(f"two runs of the ladder have one name: {', '.join(names)}")
        if self.target_rung().name in names:
            raise UserError(
                f"the target {self.target_rung().name} is one of the runs that are fitted; give it "
                "another size or length"
            )

    def data_recipe(self) -> Recipe:
        """The same data as experiments.olmo2 prepares and reads them."""
        rung = self.rungs()[0]
        config = rung.train_config(
            seed=self.seed, execution=self.execution, checkpoint=self.checkpoint
        )
        return Recipe(
            name=f"ladder-{self.name}",
            pretrain=config,
            anneal=Anneal((Ingredient(self.seed, 1, self.mix),), rung.batch_size),
            pretrain_mix=self.mix,
            data_seed=self.seed,
            corpus=self.corpus,
            data={self.mix: self.data} if self.data else {},
        )


def _released(name: str) -> Size:
    shape = SIZES[name]
    return Size(name, shape.d_model, shape.n_layers, shape.n_heads, shape.d_ff)


def paper() -> Ladder:
    """The ladder of the paper: four sizes, four lengths, the 7B as target.

    Command: `python -m experiments.ladder all --preset paper --dry-run`; training needs
    `--ladder.data DIRECTORY` (prepared with `olmax prepare`) and `--ladder.requests DIRECTORY`.

    Expected of the dry run: 16 runs, 5.153e21 FLOPs as 6ND, 3.2% of the 7B's.
    """
    return Ladder(
        name="paper",
        sizes=tuple(_released(name) for name in LADDER_SIZES),
        lengths=LADDER_LENGTHS,
        target=_released("7B"),
        # 3.9T tokens of 137.8B for 1xC.
        target_length=28.6389,
        execution=Execution(compute_dtype="bfloat16", remat="full"),
        checkpoint=CheckpointConfig(interval=None, ephemeral_interval=500),
        topology="v5p:2x2x4",
    )


# Half of the tokens are text that the tasks are made from; arithmetic is a third, so that models of
# this size begin to learn it.
_TINY_MIXES = {"ladder": {"docs": 0.35, "code": 0.30, "arithmetic": 0.35}}


def tiny() -> Ladder:
    """A whole ladder on two CPU cores: twelve runs, a prediction, and the model it is about.

    Command: `python -m experiments.ladder all --preset tiny`.

    Expected: under 20 minutes on two cores and `runs/ladder-tiny/report.html`. The numbers of a run
    stand in experiments/ladder/README.md.
    """
    return Ladder(
        name="tiny",
        sizes=(
            Size("11K", 12, 2, 1, 48),
            Size("17K", 16, 2, 1, 64),
            Size("23K", 20, 2, 1, 80),
            Size("31K", 24, 2, 1, 96),
        ),
        # Longer than the published ones: with a few hundred updates a run says more about its
        # number of updates than about its size.
        lengths=(2.0, 4.0, 8.0),
        target=Size("72K", 40, 2, 1, 160),
        target_length=6.0,
        vocab_size=512,
        seq_len=128,
        batch_divisor=1,
        extra_steps=0,
        evaluations=12,
        mix="ladder",
        corpus=Corpus(vocab_size=512, mixes=_TINY_MIXES, max_tokens=3_000_000),
        questions=120,
        last=3,
        execution=Execution(unroll_layers=True),
        checkpoint=CheckpointConfig(interval=None, ephemeral_interval=400),
    )


def smoke() -> Ladder:
    """Every stage in seconds, for tests: the numbers mean nothing.

    Command: `python -m experiments.ladder all --preset smoke`.

    Expected: about a minute on two cores, most of it compilation.
    """
    return dataclasses.replace(
        tiny(),
        name="smoke",
        sizes=(
            Size("4K", 8, 1, 1, 32),
            Size("10K", 16, 1, 1, 64),
        ),
        lengths=(0.05, 0.1, 0.2),
        # Of a size that is compiled already.
        target=Size("10K", 16, 1, 1, 64),
        target_length=0.9,
        vocab_size=384,
        evaluations=5,
        corpus=Corpus(vocab_size=384, mixes=_TINY_MIXES, max_tokens=20_000, tokenizer_bytes=40_000),
        questions=6,
        resamples=40,
        execution=Execution(),
    )


PRESETS: dict[str, Callable[[], Ladder]] = {"tiny": tiny, "smoke": smoke, "paper": paper}


def get_ladder(name: str) -> Ladder:
    """The ladder called `name`.

    Raises:
      UserError: no such preset; the message names near ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)
        raise UserError(f"unknown preset {name!r}; did you mean {', '.join(near)}?")
    return PRESETS[name]()
