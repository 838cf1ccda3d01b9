"""What a recipe would do: sizes, compute, learning rates and tokens, without doing it."""

import dataclasses
import json
from typing import Any

from rich.console import Console

from experiments.olmoe.recipe import Recipe
from olmax.reporting.tables import Column, Table
from olmax.training import config_json
from olmax.training.schedules import learning_rate


def plan(recipe: Recipe) -> dict[str, Any]:
    """The numbers of a dry run, all exact."""
    models = {name: config.model for name, config in recipe.runs().items()}
    return {
        "name": recipe.name,
        "models": {
            name: {
                "parameters": model.num_params,
                "active_parameters": model.num_active_params,
                "active_non_embedding_parameters": model.num_active_non_embedding_params,
                "matmul_flops_per_token": model.matmul_flops_per_token(recipe.train.seq_len),
            }
            for name, model in models.items()
        },
        "tokens_per_step": recipe.train.tokens_per_step,
        "steps": recipe.train.total_steps + (recipe.anneal.steps if recipe.anneal else 0),
        "tokens": recipe.tokens + recipe.anneal_tokens,
        "schedule": _schedule(recipe),
        "notes": list(recipe.notes),
    }


def _schedule(recipe: Recipe) -> list[dict[str, Any]]:
    """Learning rates at the steps that matter."""
    config, per_step = recipe.train, recipe.train.tokens_per_step
    schedule = config.resolved_schedule
    warmup = schedule.warmup / (per_step if schedule.units == "tokens" else 1)
    total = config.total_steps
    moments = {1: "first update", round(warmup): "end of warm-up"}
    moments |= {total // 4: "a quarter", total // 2: "half", total: "end of pretraining"}
    rows = [
        ("pretrain", step, step * per_step, float(learning_rate(schedule, step, per_step)), what)
        for step, what in sorted(moments.items())
        if step >= 1
    ]
    if recipe.anneal is not None:
        falling = recipe.anneal.schedule
        last = recipe.anneal.steps
        rows += [
            ("anneal", step, step * per_step, float(learning_rate(falling, step)), what)
            for step, what in ((1, "first update"), (last // 2, "half way"), (last, "zero"))
        ]
    names = ("stage", "step", "tokens", "learning_rate", "moment")
    return [dict(zip(names, row, strict=True)) for row in rows]


def resolved(recipe: Recipe) -> str:
    """The recipe as JSON with everything derived filled in."""
    whole = dataclasses.replace(recipe, train=recipe.train.resolve())
    return json.dumps(config_json.to_json(whole), indent=2)


def tables(recipe: Recipe) -> list[Table]:
    """The plan as tables."""
    numbers = plan(recipe)
    sizes = Table(
        ["run", "parameters", "active", "active, no input embedding", "matrix FLOPs a token"],
        [[name, *model.values()] for name, model in numbers["models"].items()],
        title="Models",
        caption=f"{numbers['tokens_per_step']:,} tokens a step, {numbers['steps']:,} steps, "
        f"{numbers['tokens']:,} tokens.",
    )
    schedule = Table(
        ["stage", "step", "tokens", "learning rate", Column("moment", align="left")],
        [
            [r["stage"], r["step"], r["tokens"], f"{r['learning_rate']:.6g}", r["moment"]]
            for r in numbers["schedule"]
        ],
        title="Learning rate",
    )
    return [sizes, schedule]


def print_plan(recipe: Recipe, console: Console) -> None:
    """Prints the resolved configuration, the tables and the notes."""
    console.print_json(resolved(recipe))
    for table in tables(recipe):
        console.print(table.rich())
    for note in recipe.notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
