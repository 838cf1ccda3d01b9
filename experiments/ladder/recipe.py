"""The ladder's recipe as data: sizes, lengths, and the formulas for everything else.

Batch size and learning rate follow Porian et al. (arXiv 2406.19146) as rescaled for the ladder:
their laws hold for sequences of 2,048 tokens and the ladder trains on 4,096.
"""

import dataclasses
import math

from olmax.reporting.tables import Column, Table
from olmax.scaling.compute import SIZES, ModelShape

REFERENCE_PARAMETERS = 1.08e8
"""N that the batch and learning-rate laws are written around."""
TOKENS_PER_PARAMETER = 20
"""Tokens per parameter of a 1xC run."""
EXTRA_STEPS = 10
"""Every released run goes on for ten steps after its schedule has ended."""
BATCH_DIVISOR = 64
"""Sequences that a batch is a multiple of; some released runs used 128, with the same result."""
MINIMUM_LEARNING_RATE = 0.1
"""Share of the peak that the cosine ends at."""

LADDER_SIZES = ("190M", "370M", "760M", "1.3B")
"""Sizes of the paper's fit."""
LADDER_LENGTHS = (1.0, 2.0, 5.0, 10.0)
"""Lengths of the paper's fit, in xC."""
OTHER_SIZES = ("600M", "3.2B")
"""Sizes with a recipe that are not in the paper's fit."""


@dataclasses.dataclass(frozen=True)
class Rung:
    """One run of a ladder."""

    size: str
    shape: ModelShape
    length: float
    """Multiple of 20 tokens per parameter."""
    batch_divisor: int = BATCH_DIVISOR

    @property
    def name(self) -> str:
        """As the released files are called, but for 1.3B (1B there)."""
        return f"{self.size}-{self.length:g}xC"

    @property
    def batch_size(self) -> int:
        """Sequences: 160 (N / 1.08e8)^(2/3) / 2, to the nearest multiple of the divisor."""
        wanted = 160 * (self.shape.parameters / REFERENCE_PARAMETERS) ** (2 / 3) / 2
        return self.batch_divisor * round(wanted / self.batch_divisor)

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_size * self.shape.seq_len

    @property
    def learning_rate(self) -> float:
        """Peak: 0.0047 (N / 1.08e8)^(-1/3) / 4."""
        return 0.0047 * (self.shape.parameters / REFERENCE_PARAMETERS) ** (-1 / 3) / 4

    @property
    def warmup_steps(self) -> int:
        """One token per parameter."""
        return round(self.shape.parameters / self.batch_tokens)

    @property
    def schedule_steps(self) -> int:
        """Steps of the schedule: 20 tokens per parameter times the length, whole batches."""
        tokens = self.length * TOKENS_PER_PARAMETER * self.shape.parameters
        return math.ceil(tokens / self.batch_tokens)

    @property
    def steps(self) -> int:
        """Steps that are trained."""
        return self.schedule_steps + EXTRA_STEPS

    @property
    def tokens(self) -> int:
        """D of the fits: tokens seen at the last step."""
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return float(self.tokens) * self.shape.flops_per_token

    @property
    def evaluation_interval(self) -> int:
        """Steps between evaluations in the released runs."""
        return {0.5: 50, 1.0: 200, 2.0: 200, 5.0: 500, 10.0: 1000}.get(self.length, 1000)


def rung(size: str, length: float) -> Rung:
    """A run of a released size."""
    return Rung(size, SIZES[size], length)


def ladder(
    sizes: tuple[str, ...] = LADDER_SIZES, lengths: tuple[float, ...] = LADDER_LENGTHS
) -> list[Rung]:
    """All runs of a ladder, by size and then length."""
    return [rung(size, length) for size in sizes for length in lengths]


def ladder_table(rungs: list[Rung]) -> Table:
    """What would be trained, run by run, with its compute and the total."""
    columns = [
        Column("run", align="left"),
        "N",
        Column("batch", digits=0),
        Column("peak LR", align="right"),
        "warm-up",
        "steps",
        "tokens",
        "FLOPs/token",
        Column("FLOPs", align="right"),
    ]
    rows = [
        [
            r.name,
            r.shape.parameters,
            r.batch_size,
            f"{r.learning_rate:.4e}",
            r.warmup_steps,
            r.steps,
            r.tokens,
            r.shape.flops_per_token,
            f"{r.flops:.3e}",
        ]
        for r in rungs
    ]
    total = sum(r.flops for r in rungs)
    simple = sum(6.0 * r.shape.parameters * r.tokens for r in rungs)
    return Table(
        columns,
        rows,
        title="Ladder",
        caption=f"{total:.3e} FLOPs in total as counted per token, {simple:.3e} as 6ND.",
    )
