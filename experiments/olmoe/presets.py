"""The recipes by name. A preset's docstring gives the command and what to expect of it.

The published recipe: allenai/OLMoE's configs/OLMoE-1B-7B-0924.yml and its annealing configuration
(specs/olmoe.md section 2).
"""

import dataclasses
import difflib
from collections.abc import Callable

from experiments.embedded import Corpus
from experiments.olmoe.recipe import Anneal, Evaluation, Recipe, Variant
from olmax.errors import UserError
from olmax.models.config import DecoderConfig, Execution
from olmax.models.presets import get_preset
from olmax.training.config import CheckpointConfig, TrainConfig
from olmax.training.objectives import NextToken
from olmax.training.optimizers import AdamWConfig
from olmax.training.router_losses import RouterLosses
from olmax.training.schedules import ScheduleConfig

# Every parameter decays, norms and embeddings too, as `decay_norm_and_bias` and `decay_embeddings`
# of the configuration say.
_OPTIMIZER = AdamWConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, no_decay=())

VARIANTS = {
    "dense": ("olmoe-tiny-dense", None),
    "unbalanced": ("olmoe-tiny", 0.0),
    "8-experts": ("olmoe-tiny-8e", None),
    "4-experts": ("olmoe-tiny-4e", None),
    "shared": ("olmoe-tiny-shared", None),
    "expert-choice": ("olmoe-tiny-expert-choice", None),
}
"""Variants of the miniature: architecture, and the weight of the load-balancing loss."""


def _two_layers(model: str) -> DecoderConfig:
    """Half of the tiny architecture's layers, so that seven runs fit into the time."""
    return dataclasses.replace(get_preset(model), n_layers=2)


def tiny() -> Recipe:
    """OLMoE's main comparisons on two CPU cores.

    Command: `python -m experiments.olmoe all --preset tiny`.

    Expected: about ten minutes of processor time and `runs/olmoe-tiny/report.html`. The numbers of
    a run stand in experiments/olmoe/README.md.
    """
    steps = 200
    return Recipe(
        name="olmoe-tiny",
        train=TrainConfig(
            model=_two_layers("olmoe-tiny"),
            batch_size=16,
            seq_len=128,
            steps=steps,
            execution=Execution(unroll_layers=True),
            objective=NextToken(z_loss=0.0, router=RouterLosses()),
            optimizer=_OPTIMIZER,
            schedule=ScheduleConfig(kind="cosine", peak=4e-3, warmup=20, final_fraction=0.1),
            checkpoint=CheckpointConfig(interval=steps // 10),
            seed=6198,
        ),
        variants=tuple(
            Variant(name, _two_layers(model), load_balance)
            for name, (model, load_balance) in VARIANTS.items()
        ),
        data_seed=6198,
        corpus=Corpus(
            mixes={"pretrain": {"code": 0.4, "docs": 0.3, "arithmetic": 0.15, "tests": 0.15}},
            max_tokens=400_000,
            tokenizer_bytes=1_000_000,
        ),
        evaluation=Evaluation(every=50),
        notes=(
            "Like OLMoE: experts a quarter as wide as the dense block that is as active, softmax "
            "then top-k without renormalising, both auxiliary losses, weight decay on everything.",
            "Unlike it: sizes, text, 16 experts of which 4 are active instead of 64 and 8, and a "
            "learning rate for this width.",
        ),
    )


def smoke() -> Recipe:
    """Every stage in seconds, for tests: the numbers mean nothing.

    Command: `python -m experiments.olmoe all --preset smoke`.

    Expected: about a minute on two cores, most of it compilation.
    """
    recipe = tiny()
    small = dict(
        d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, vocab_size=384,
        max_seq_len=64,
    )  # fmt: skip

    def shrink(model):
        return dataclasses.replace(model, d_ff=model.d_ff // 8, **small)

    kept = ("dense", "unbalanced")
    return dataclasses.replace(
        recipe,
        name="olmoe-smoke",
        train=dataclasses.replace(
            recipe.train,
            model=shrink(recipe.train.model),
            batch_size=4,
            seq_len=32,
            steps=10,
            schedule=ScheduleConfig(kind="cosine", peak=4e-3, warmup=2, final_fraction=0.1),
            checkpoint=CheckpointConfig(interval=2),
            execution=Execution(),
            log_interval=5,
        ),
        variants=tuple(
            dataclasses.replace(variant, model=shrink(variant.model))
            for variant in recipe.variants
            if variant.name in kept
        ),
        corpus=Corpus(
            vocab_size=384,
            mixes={"pretrain": {"code": 0.5, "docs": 0.25, "arithmetic": 0.25}},
            max_tokens=10_000,
            tokenizer_bytes=40_000,
        ),
        evaluation=Evaluation(documents=2, document_bytes=300, every=5, routing_tokens=256),
    )


def olmoe_1b_7b() -> Recipe:
    """OLMoE-1B-7B-0924: 5.03T tokens, then 100B of annealing.

    Command: `python -m experiments.olmoe all --preset olmoe-1b-7b --dry-run`.

    Expected: 6,919,161,856 parameters, 1,281,951,744 active; 4,194,304 tokens a step; learning rate
    4e-4 at step 2500; annealing from 4e-5 to zero in 23,842 steps; 1,223,842 steps, 5.133T tokens.
    """
    return Recipe(
        name="olmoe-1b-7b",
        train=TrainConfig(
            model=get_preset("olmoe-1b-7b"),
            batch_size=1024,
            seq_len=4096,
            steps=1_200_000,
            execution=Execution(compute_dtype="bfloat16", remat="full"),
            objective=NextToken(z_loss=0.0, denominator="tokens", router=RouterLosses()),
            optimizer=_OPTIMIZER,
            schedule=ScheduleConfig(
                kind="cosine",
                peak=4e-4,
                warmup=10_485_760_000,
                duration=5e12,
                final_fraction=0.1,
                units="tokens",
            ),
            checkpoint=CheckpointConfig(interval=5000, ephemeral_interval=500),
            seed=6198,
        ),
        mix="olmoe_mix_0924",
        data_seed=6198,
        anneal=Anneal(steps=23_842, seed=42, peak=4e-5),
        notes=(
            "Router z-loss 0.001 as configured; the code divides it by the 8 experts of a token, "
            "so the effective weight is 1.25e-4 (the paper writes the loss without the division: "
            "--train.objective.router.no-divide-z-by-top-k).",
            "The auxiliary losses' statistics are those of one device's micro-batch; the "
            "published run had 4 sequences on each (statistics=global takes all devices).",
            "The cosine is laid out for 5T tokens; pretraining ends at 5.033T, so the last steps "
            "are at its floor of 4e-5, where annealing starts.",
            "The configuration says eos id 0; documents were tokenised with 50279, as the released "
            "model says.",
            "About 1.3 epochs were trained (max_duration 2ep), shuffled anew each epoch.",
        ),
    )


def _ablation(model: str, tokens: float) -> Recipe:
    """An ablation of the paper: the main recipe, with its cosine over `tokens`."""
    recipe = olmoe_1b_7b()
    steps = round(tokens / recipe.train.tokens_per_step)
    # The dense twin's configuration says `decay_embeddings: false`.
    dense = get_preset(model).moe is None
    optimizer = dataclasses.replace(_OPTIMIZER, no_decay=("embedder.embedding",) if dense else ())
    return dataclasses.replace(
        recipe,
        name=model,
        train=dataclasses.replace(
            recipe.train,
            model=get_preset(model),
            steps=steps,
            optimizer=optimizer,
            schedule=dataclasses.replace(recipe.train.schedule, duration=tokens),
        ),
        anneal=None,
        notes=recipe.notes[:2],
    )


ABLATIONS = {
    "olmoe-ablation-dense": 130e9,
    "olmoe-ablation-64e": 130e9,
    "olmoe-ablation-32e": 130e9,
    "olmoe-ablation-8e": 130e9,
    "olmoe-ablation-shared": 130e9,
    "olmoe-ablation-expert-choice": 203e9,
}
"""Ablations of the paper and the tokens they were run for."""

PRESETS: dict[str, Callable[[], Recipe]] = {
    "tiny": tiny,
    "smoke": smoke,
    "olmoe-1b-7b": olmoe_1b_7b,
    **{
        name: lambda name=name, tokens=tokens: _ablation(name, tokens)
        for name, tokens in ABLATIONS.items()
    },
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
