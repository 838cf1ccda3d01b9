"""The recipes by name. A preset's docstring gives the command and what to expect of it.

Published recipes: specs in the OLMo 2 paper (tables 3 and 13, sections 2.3 and 4) and the released
configurations; where those differ, a note of the preset says which one stands here. They are what
ran, so their z-loss is the effective one.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

from experiments.embedded import Corpus
from experiments.olmo2.recipe import (
    Anneal,
    Evaluation,
    Ingredient,
    Microanneal,
    Recipe,
    Stability,
    tokens_to_steps,
)
from olmax.errors import UserError
from olmax.models.config import Execution
from olmax.models.presets import get_preset
from olmax.training.config import CheckpointConfig, TrainConfig
from olmax.training.objectives import NextToken
from olmax.training.optimizers import AdamWConfig, SkipStepConfig
from olmax.training.schedules import ScheduleConfig

# Shares of the Dolmino 50B mix (paper, table 13): math 20.8 %, instructions 16.6 %, the rest
# filtered web, papers, encyclopedia and Q&A. In the miniature, documentation stands for the
# high-quality text, library code for the instructions, generated arithmetic for the math.
_DOLMINO_LIKE = {"docs": 0.626, "code": 0.166, "arithmetic": 0.208}
# Mostly unfiltered (the library's repetitive tests), with little documentation and hardly any
# arithmetic, as OLMo-Mix-1124 is mostly web pages with 0.3 % of mathematical ones.
_PRETRAINING_LIKE = {"tests": 0.50, "code": 0.34, "docs": 0.15, "arithmetic": 0.01}
_MIXES = {
    "pretrain": _PRETRAINING_LIKE,
    "anneal": _DOLMINO_LIKE,
    # Microanneals (paper, table 12): the math under test with general text around it.
    "docs_only": {"docs": 1.0},
    "math_10": {"docs": 0.9, "arithmetic": 0.1},
    "math_35": {"docs": 0.65, "arithmetic": 0.35},
}


def tiny() -> Recipe:
    """All of OLMo 2's recipe on two CPU cores.

    Command: `python -m experiments.olmo2 all --preset tiny` (also `make run`).

    Expected: at most ten minutes on two cores and `runs/olmo2-tiny/report.html`. The numbers of a
    run stand in experiments/olmo2/README.md.
    """
    model = dataclasses.replace(get_preset("olmo2-tiny"), vocab_size=1024, max_seq_len=256)
    return Recipe(
        name="olmo2-tiny",
        pretrain=TrainConfig(
            model=model,
            batch_size=16,
            seq_len=256,
            steps=420,
            execution=Execution(unroll_layers=True),
            objective=NextToken(z_loss=1e-5),
            # A cosine to 10 % that would last 1.28 times as long, as the 7B's 5T and 3.9T.
            schedule=ScheduleConfig(
                kind="cosine", peak=4e-3, warmup=40, duration=538, final_fraction=0.1
            ),
            checkpoint=CheckpointConfig(interval=None, ephemeral_interval=120),
            seed=6198,
        ),
        anneal=Anneal(
            batch_size=16,
            ingredients=(
                Ingredient(seed=42, steps=60, mix="anneal"),
                Ingredient(seed=42069, steps=60, mix="anneal"),
                Ingredient(seed=666, steps=60, mix="anneal"),
            ),
        ),
        data_seed=6198,
        corpus=Corpus(vocab_size=1024, mixes=_MIXES),
        evaluation=Evaluation(every=84),
        microanneal=Microanneal(mixes=("pretrain", "docs_only", "math_10", "math_35")),
        published="OLMo 2 7B",
        notes=(
            "Like the 7B: three annealing runs with the seeds 42, 42069 and 666, one soup.",
            "Unlike any published run: size, text, a learning rate for this width, one epoch or "
            "less of a few megabytes.",
        ),
    )


def smoke() -> Recipe:
    """Every stage in seconds, for tests: the numbers mean nothing.

    Command: `python -m experiments.olmo2 all --preset smoke`.

    Expected: under a minute on two cores, most of it compilation.
    """
    recipe = tiny()
    model = dataclasses.replace(
        recipe.pretrain.model,
        d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, vocab_size=384,
        max_seq_len=128,
    )  # fmt: skip
    return dataclasses.replace(
        recipe,
        name="olmo2-smoke",
        pretrain=dataclasses.replace(
            recipe.pretrain,
            model=model,
            batch_size=8,
            seq_len=64,
            steps=12,
            schedule=ScheduleConfig(
                kind="cosine", peak=6e-3, warmup=3, duration=16, final_fraction=0.1
            ),
            checkpoint=CheckpointConfig(interval=None, ephemeral_interval=5),
            execution=Execution(),
            log_interval=4,
        ),
        anneal=Anneal(
            batch_size=8,
            ingredients=tuple(Ingredient(seed=seed, steps=5, mix="anneal") for seed in (42, 42069)),
        ),
        corpus=Corpus(
            vocab_size=384,
            mixes=_MIXES,
            max_tokens=20_000,
            tokenizer_bytes=40_000,
        ),
        evaluation=Evaluation(
            documents=2, document_bytes=400, questions=6, shots=1, sample_tokens=8, every=6
        ),
        microanneal=Microanneal(mixes=("math_35",), steps=3),
        stability=Stability(widths=(16, 32), layers=2, documents=2),
    )


_OLD_TRAINER_NOTES = (
    "z-loss 1e-4: the configuration says 1e-5, but the trainer that made this model never read it "
    "and used 1e-4 (paper section 3.3.3 says 1e-4, table 1 says 1e-5).",
    "The loss is divided by all tokens of the batch, as that trainer did.",
)


def olmo2_1b() -> Recipe:
    """OLMo 2 1B (0425): 4.0T tokens, then 50B of Dolmino.

    Command: `python -m experiments.olmo2 all --preset olmo2-1b --dry-run`.

    Expected: 1,484,916,736 parameters; learning rate 7.4487e-5 at step 1,907,359, where stage 2
    begins. Three ingredients were trained and not souped: the released model is the one of seed 42.
    """
    steps = 1_907_359
    seeds = (42, 42069, 666)
    anneal_steps = tokens_to_steps(50e9, 512, 4096)
    return Recipe(
        name="olmo2-1b",
        pretrain=_old_trainer("olmo2-1b", batch_size=512, peak=4e-4, steps=steps),
        anneal=Anneal(
            batch_size=512,
            ingredients=tuple(
                Ingredient(seed, anneal_steps, "dolmino_mix_1124_50b", 10, souped=False)
                for seed in seeds
            ),
        ),
        pretrain_mix="olmo_mix_1124",
        data_seed=6198,
        published="OLMo 2 1B",
        notes=(
            *_OLD_TRAINER_NOTES,
            "Warm-up 8,388,608,000 tokens = 4000 steps, as configured; the paper says 2000 steps.",
        ),
    )


def olmo2_7b() -> Recipe:
    """OLMo 2 7B (1124): 3.9T tokens, then a soup of three 50B anneals.

    Command: `python -m experiments.olmo2 all --preset olmo2-7b --dry-run`.

    Expected: 7,298,617,344 parameters, 4.05T tokens, 1.8e23 FLOPs; stage 2 starts at the learning
    rate 6.1499e-5.
    """
    anneal_steps = tokens_to_steps(50e9, 1024, 4096)
    return Recipe(
        name="olmo2-7b",
        pretrain=_old_trainer("olmo2-7b", batch_size=1024, peak=3e-4, steps=928_646),
        anneal=Anneal(
            batch_size=1024,
            learning_rate_step=928_000,
            ingredients=tuple(
                Ingredient(seed, anneal_steps, "dolmino_mix_1124_50b", 10)
                for seed in (42, 42069, 666)
            ),
        ),
        pretrain_mix="olmo_mix_1124",
        data_seed=6198,
        published="OLMo 2 7B",
        notes=(
            *_OLD_TRAINER_NOTES,
            "Stage 2 loads step 928,646, but its learning rate 6.1499e-5 is that of step 928,000 "
            "(6.1351e-5 at 928,646).",
        ),
    )


def olmo2_13b() -> Recipe:
    """OLMo 2 13B (1124): 5.0T tokens, then a soup of three 100B anneals and a 300B one.

    Command: `python -m experiments.olmo2 all --preset olmo2-13b --dry-run`.

    Expected: 13,716,198,400 parameters, 5.6T tokens, 4.6e23 FLOPs; stage 2 starts at 9.0e-5.
    """
    short, long = (tokens_to_steps(tokens, 2048, 4096) for tokens in (100e9, 300e9))
    return Recipe(
        name="olmo2-13b",
        pretrain=_old_trainer("olmo2-13b", batch_size=2048, peak=9e-4, steps=596_057),
        anneal=Anneal(
            batch_size=2048,
            ingredients=(
                *(
                    Ingredient(seed, short, "dolmino_mix_1124_100b", 10)
                    for seed in (1110, 2662, 6209)
                ),
                Ingredient(2662, long, "dolmino_mix_1124_300b", 10),
            ),
        ),
        pretrain_mix="olmo_mix_1124",
        data_seed=6198,
        published="OLMo 2 13B",
        notes=(
            *_OLD_TRAINER_NOTES,
            "Peak learning rate 9e-4, as launched and as in the paper; the released configuration "
            "says 3e-4.",
            "Warm-up 8,388,608,000 tokens = 1000 steps, as configured; the paper says 2000 steps.",
        ),
    )


def olmo2_32b() -> Recipe:
    """OLMo 2 32B (0325): 6.1T tokens, then a soup of 100B and 300B anneals.

    Command: `python -m experiments.olmo2 all --preset olmo2-32b --dry-run`.

    Expected: 32,234,279,936 parameters, 6.6T tokens, 1.3e24 FLOPs; stage 2 starts at 6.6232e-5.
    """
    tokens_per_step = 2048 * 4096
    return Recipe(
        name="olmo2-32b",
        pretrain=TrainConfig(
            model=get_preset("olmo2-32b"),
            batch_size=2048,
            seq_len=4096,
            steps=721_901,
            execution=Execution(compute_dtype="bfloat16", remat="full"),
            objective=NextToken(z_loss=1e-5),
            optimizer=AdamWConfig(skip_step=SkipStepConfig(enabled=True)),
            schedule=ScheduleConfig(
                kind="cosine",
                peak=6e-4,
                warmup=2000,
                duration=math.ceil(6.5e12 / tokens_per_step),
                final_fraction=0.1,
                units="steps",
            ),
            checkpoint=CheckpointConfig(interval=1000, ephemeral_interval=250),
            seed=12536,
        ),
        anneal=Anneal(
            batch_size=2048,
            ingredients=(
                Ingredient(1110, tokens_to_steps(100e9, 2048, 4096), "dolmino_mix_1124_100b"),
                Ingredient(2662, tokens_to_steps(100e9, 2048, 4096), "dolmino_mix_1124_100b"),
                Ingredient(2662, tokens_to_steps(300e9, 2048, 4096), "dolmino_mix_1124_300b"),
            ),
        ),
        pretrain_mix="olmo_mix_1124",
        data_seed=34521,
        repetition_filter=False,
        published="OLMo 2 32B",
        notes=(
            "Soup: the paper says three 100B runs and one of 300B; the released scripts list three "
            "ingredients (100B with seeds 1110 and 2662, 300B with 2662), which stand here. Which "
            "of the two was released is not known.",
            "The scripts call this model's mix Dolmino-mix-0324; its shares are not published, "
            "those of Dolmino-mix-1124 stand here.",
            "No repetition filter: steps on spikes of the loss or gradient norm are skipped "
            "instead.",
            "Different seeds for initialisation (12536) and data order (34521).",
        ),
    )


def _old_trainer(model: str, *, batch_size: int, peak: float, steps: int) -> TrainConfig:
    """Stage 1 of the models trained with the OLMo repository (1B, 7B, 13B)."""
    return TrainConfig(
        model=get_preset(model),
        batch_size=batch_size,
        seq_len=4096,
        steps=steps,
        execution=Execution(compute_dtype="bfloat16", remat="full"),
        objective=NextToken(z_loss=1e-4, denominator="tokens"),
        optimizer=AdamWConfig(),
        schedule=ScheduleConfig(
            kind="cosine",
            peak=peak,
            warmup=8_388_608_000,
            duration=5e12,
            final_fraction=0.1,
            units="tokens",
        ),
        checkpoint=CheckpointConfig(interval=1000, ephemeral_interval=250),
        seed=6198,
    )


PRESETS: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "smoke": smoke,
    "olmo2-1b": olmo2_1b,
    "olmo2-7b": olmo2_7b,
    "olmo2-13b": olmo2_13b,
    "olmo2-32b": olmo2_32b,
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
      UserError: no such preset; the message names near ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)
        raise UserError(f"unknown preset {name!r}; did you mean {', '.join(near)}?")
    return PRESETS[name]()
