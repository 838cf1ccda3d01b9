"""What a recipe would do: sizes, compute, learning rates, tokens and mixes, without doing it."""

import dataclasses
import json
from typing import Any

from rich.console import Console

from experiments.olmo2.recipe import Recipe, ingredient_name
from olmax.data import mixtures
from olmax.reporting.tables import Column, Table
from olmax.training import config_json
from olmax.training.schedules import learning_rate


def plan(recipe: Recipe) -> dict[str, Any]:
    """The numbers of a dry run.

    Tokens and parameters are exact; `flops` are 6 x parameters x tokens of everything behind the
    final model, as the paper counts them, and `flops_exact` adds attention
    (`DecoderConfig.flops_per_token`).
    """
    recipe.check()
    model = recipe.pretrain.model
    per_token = model.flops_per_token(recipe.pretrain.seq_len)
    return {
        "name": recipe.name,
        "parameters": model.num_params,
        "non_embedding_parameters": model.num_non_embedding_params,
        "flops_per_token": per_token,
        "pretrain_tokens": recipe.pretrain_tokens,
        "model_tokens": recipe.model_tokens,
        "flops": 6 * model.num_params * recipe.model_tokens,
        "flops_exact": per_token * recipe.model_tokens,
        "schedule": _schedule(recipe),
        "ingredients": [
            {
                "name": ingredient_name(number),
                "seed": ingredient.seed,
                "mix": ingredient.mix,
                "steps": ingredient.steps + ingredient.steps_at_zero,
                "zero_at_step": ingredient.steps,
                "tokens": recipe.ingredient_tokens(ingredient),
                "souped": ingredient.souped,
            }
            for number, ingredient in enumerate(recipe.anneal.ingredients)
        ],
        "mixes": {name: mix_rates(recipe, name) for name in _mix_names(recipe)},
        "notes": list(recipe.notes),
    }


def mix_rates(recipe: Recipe, mix: str) -> dict[str, float]:
    """Share of each source in a mix of the recipe, summing to 1.

    Raises:
      UserError: no such mix.
    """
    if recipe.corpus is not None:
        return recipe.corpus.rates(mix)
    return mixtures.get(mix).rates()


def _mix_names(recipe: Recipe) -> list[str]:
    return list(dict.fromkeys([recipe.pretrain_mix, *(i.mix for i in recipe.anneal.ingredients)]))


def _schedule(recipe: Recipe) -> list[dict[str, Any]]:
    """Learning rates at the steps that matter: (stage, step, tokens, rate, what)."""
    config = recipe.pretrain
    schedule = config.resolved_schedule
    per_step = config.tokens_per_step
    warmup = schedule.warmup / (per_step if schedule.units == "tokens" else 1)
    total = config.total_steps
    moments = {1: "first update", round(warmup): "end of warm-up"}
    for quarter in (1, 2, 3):
        moments.setdefault(round(total * quarter / 4), f"{25 * quarter} % of pretraining")
    moments[total] = "end of pretraining"
    if recipe.anneal.learning_rate_step:
        moments.setdefault(recipe.anneal.learning_rate_step, "where stage 2 takes its rate")
    rows = [
        ("pretrain", step, step * per_step, float(learning_rate(schedule, step, per_step)), what)
        for step, what in sorted(moments.items())
        if step >= 1
    ]
    per_step = recipe.anneal.batch_size * config.seq_len
    seen = set()
    for ingredient in recipe.anneal.ingredients:
        if (ingredient.mix, ingredient.steps) in seen:
            continue
        seen.add((ingredient.mix, ingredient.steps))
        falling = recipe.anneal_schedule(ingredient)
        last = ingredient.steps + ingredient.steps_at_zero
        moments = {1: "first update", ingredient.steps // 2: "half way", ingredient.steps: "zero"}
        moments.setdefault(last, "last update")
        rows += [
            (ingredient.mix, step, step * per_step, float(learning_rate(falling, step)), what)
            for step, what in sorted(moments.items())
        ]
    names = ("stage", "step", "tokens", "learning_rate", "moment")
    return [dict(zip(names, row, strict=True)) for row in rows]


def resolved(recipe: Recipe) -> str:
    """The recipe as JSON with everything derived filled in."""
    whole = dataclasses.replace(recipe, pretrain=recipe.pretrain.resolve())
    return json.dumps(config_json.to_json(whole), indent=2)


def tables(recipe: Recipe) -> list[Table]:
    """The plan as tables."""
    numbers = plan(recipe)
    sizes = Table(
        ["", "value"],
        [
            ["parameters", numbers["parameters"]],
            ["without the input embedding", numbers["non_embedding_parameters"]],
            ["training FLOPs per token", numbers["flops_per_token"]],
            ["tokens of pretraining", f"{numbers['pretrain_tokens']:,}"],
            ["tokens behind the final model", f"{numbers['model_tokens']:,}"],
            ["FLOPs, 6 x parameters x tokens", f"{numbers['flops']:.3e}"],
            ["FLOPs with attention", f"{numbers['flops_exact']:.3e}"],
        ],
        title="Size",
    )
    schedule = Table(
        ["stage", "step", "tokens", "learning rate", Column("moment", align="left")],
        [
            [
                row["stage"], row["step"], short(row["tokens"]), f"{row['learning_rate']:.6g}",
                row["moment"],
            ]
            for row in numbers["schedule"]
        ],
        title="Learning rate",
    )  # fmt: skip
    ingredients = Table(
        [
            "ingredient", "seed", Column("mix", align="left"), "steps", "zero at step", "tokens",
            "souped",
        ],
        [
            [i["name"], str(i["seed"]), i["mix"], i["steps"], i["zero_at_step"],
             short(i["tokens"]), i["souped"]]
            for i in numbers["ingredients"]
        ],
        title="Annealing runs",
    )  # fmt: skip
    mixes = Table(
        ["mix", Column("source", align="left"), Column("share %", digits=2)],
        [
            [mix, source, 100 * share]
            for mix, rates in numbers["mixes"].items()
            for source, share in rates.items()
        ],
        title="Mixes",
    )
    return [sizes, schedule, ingredients, mixes]


def short(tokens: float) -> str:
    """A number of tokens with four digits and a unit: `3.895T`, `50.04B`, `2.458M`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.4g}{unit}"
    return f"{tokens:.4g}"


def print_plan(recipe: Recipe, console: Console) -> None:
    """Prints the resolved configuration, the tables and the notes."""
    console.print_json(resolved(recipe))
    for table in tables(recipe):
        console.print(table.rich())
    for note in recipe.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
