"""The ladder's recipe as data: sizes, lengths, and the formulas for everything else.

Batch size and learning rate follow Porian et al. (arXiv 2406.19146) as rescaled for the ladder:
their laws hold for sequences of 2,048 tokens and the ladder trains on 4,096. A batch keeps its
tokens whatever the length of the sequences; the learning rate is the ladder's.
"""

import dataclasses
import math

from olmax.models.config import DecoderConfig, Execution
from olmax.scaling.compute import SIZES, ModelShape
from olmax.training.config import CheckpointConfig, TrainConfig
from olmax.training.objectives import NextToken
from olmax.training.schedules import ScheduleConfig

REFERENCE_PARAMETERS = 1.08e8
"""N that the batch and learning-rate laws are written around."""
TOKENS_PER_PARAMETER = 20
"""Tokens per parameter of a 1xC run."""
REFERENCE_SEQUENCE = 2048
"""Tokens of a sequence that the batch law is written for."""
EXTRA_STEPS = 10
"""Every released run goes on for ten steps after its schedule has ended."""
BATCH_DIVISOR = 64
"""Sequences that a batch is a multiple of; some released runs used 128, with the same result."""
MINIMUM_LEARNING_RATE = 0.1
"""Share of the peak that the cosine ends at."""
Z_LOSS = 1e-5
"""Weight of the squared log normaliser in the loss."""

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
    extra_steps: int = EXTRA_STEPS
    evaluations: int | None = None
    """Evaluations of the run; None: as often as the released runs."""

    @property
    def name(self) -> str:
        """As the released files are called, but for 1.3B (1B there)."""
        return f"{self.size}-{self.length:g}xC"

    @property
    def batch_size(self) -> int:
        """Sequences: 160 (N / 1.08e8)^(2/3), halved for those of 4,096 tokens, to the nearest
        multiple of the divisor.
        """
        wanted = 160 * (self.shape.parameters / REFERENCE_PARAMETERS) ** (2 / 3)
        wanted *= REFERENCE_SEQUENCE / self.shape.seq_len
        return self.batch_divisor * max(1, round(wanted / self.batch_divisor))

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
        return self.schedule_steps + self.extra_steps

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
        """Steps between evaluations."""
        if self.evaluations is not None:
            return max(1, math.ceil(self.steps / self.evaluations))
        return {0.5: 50, 1.0: 200, 2.0: 200, 5.0: 500, 10.0: 1000}.get(self.length, 1000)

    def model(self) -> DecoderConfig:
        """The architecture: OLMo 2's blocks, untied head."""
        s = self.shape
        return DecoderConfig(
            d_model=s.d_model,
            n_layers=s.n_layers,
            n_heads=s.n_heads,
            n_kv_heads=s.n_heads,
            head_dim=s.d_model // s.n_heads,
            d_ff=s.d_ff,
            vocab_size=s.vocab_size,
            max_seq_len=s.seq_len,
        )

    def train_config(
        self,
        *,
        seed: int,
        execution: Execution,
        checkpoint: CheckpointConfig,
        mesh: str = "fsdp=-1",
        accumulation: int = 1,
    ) -> TrainConfig:
        """The whole training run; optimiser, decay and clipping are the defaults, OLMo 2's."""
        return TrainConfig(
            model=self.model(),
            batch_size=self.batch_size,
            seq_len=self.shape.seq_len,
            steps=self.steps,
            execution=execution,
            objective=NextToken(z_loss=Z_LOSS),
            schedule=ScheduleConfig(
                kind="cosine",
                peak=self.learning_rate,
                warmup=self.warmup_steps,
                duration=self.schedule_steps,
                final_fraction=MINIMUM_LEARNING_RATE,
            ),
            checkpoint=checkpoint,
            accumulation=accumulation,
            seed=seed,
            mesh=mesh,
            log_interval=100,
            tensorboard=False,
        )


def rung(size: str, length: float) -> Rung:
    """A run of a released size."""
    return Rung(size, SIZES[size], length)


def ladder(
    sizes: tuple[str, ...] = LADDER_SIZES, lengths: tuple[float, ...] = LADDER_LENGTHS
) -> list[Rung]:
    """All runs of a ladder, by size and then length."""
    return [rung(size, length) for size in sizes for length in lengths]
