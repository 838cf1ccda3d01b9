"""Stage microanneal: one checkpoint annealed on several small mixes, compared on math and rest.

Paper section 4.4.2: a source under test with about as much general text, so that a mix is chosen
for a fraction of the cost of a whole mid-training.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from experiments.olmo2 import published, suite, training_stages
from experiments.olmo2.comparison import average_accuracy, average_accuracy_change, average_bits
from experiments.olmo2.dry_run import mix_rates
from experiments.olmo2.evaluate import bits_per_byte, evaluate_model
from experiments.olmo2.preparation import load_tokenizer
from experiments.olmo2.recipe import Ingredient, Recipe
from experiments.stages import Stages
from olmax.errors import UserError
from olmax.models.config import Execution
from olmax.reporting.document import Block, TableBlock
from olmax.reporting.files import jsonable, write_json
from olmax.reporting.tables import Column, Table
from olmax.training.checkpoints import restore_model

TITLE = "Microanneals"
DIRECTORY = "microanneal"


def run(recipe: Recipe, directory: pathlib.Path, stages: Stages, console: Console) -> None:
    """Trains and evaluates the recipe's microanneals; results in `microanneal/results.json`.

    Raises:
      UserError: the recipe names none, or pretraining is not complete.
    """
    if not recipe.microanneal.mixes:
        raise UserError(f"preset {recipe.name} names no mixes; give --microanneal.mixes")
    for mix in recipe.microanneal.mixes:
        settings = {"rates": mix_rates(recipe, mix), "microanneal": recipe.microanneal}
        output = directory / DIRECTORY / mix
        with stages.run(
            f"microanneal/{mix}",
            settings,
            after=["pretrain"],
            outputs=[f"{DIRECTORY}/{mix}"],
            costly=True,
        ) as wanted:
            if wanted:
                ingredient = Ingredient(recipe.microanneal.seed, recipe.microanneal.steps, mix)
                training_stages.anneal_into(recipe, ingredient, directory, output)
    after = ["held-out", *(f"microanneal/{mix}" for mix in recipe.microanneal.mixes)]
    results = f"{DIRECTORY}/results.json"
    with stages.run("microanneal", recipe.evaluation, after=after, outputs=[results]) as wanted:
        if wanted:
            write_json(directory / results, _evaluate(recipe, directory, console))
    console.print(_table(json.loads((directory / results).read_text())).rich())


def _evaluate(recipe: Recipe, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    tokenizer = load_tokenizer(recipe, directory)
    paths = {"not annealed": directory / training_stages.PRETRAIN}
    paths |= {mix: directory / DIRECTORY / mix for mix in recipe.microanneal.mixes}
    found = {}
    for name, path in paths.items():
        console.print(f"evaluating {name}")
        execution = Execution(compute_dtype=recipe.pretrain.execution.compute_dtype)
        model = restore_model(str(path), execution=execution)
        found[name] = evaluate_model(model, tokenizer, recipe, directory)
    steps = recipe.microanneal.steps
    tokens = steps * recipe.anneal.batch_size * recipe.pretrain.seq_len
    mixes = {mix: mix_rates(recipe, mix) for mix in recipe.microanneal.mixes}
    return jsonable({"tokens": tokens, "mixes": mixes, "evaluation": found})


def blocks(study: Mapping[str, Any]) -> list[Block]:
    """The study as part of a report."""
    return [TableBlock(_table(study)), TableBlock(_published())]


def _table(study: Mapping[str, Any]) -> Table:
    results = study["evaluation"]
    before = results["not annealed"]
    math_tasks = list(suite.MATH_TASKS)
    others = [task for task in suite.METRICS if task not in math_tasks]
    rest = [source for source in before["sources"] if source != "arithmetic"]
    rows = []
    for name, result in results.items():
        rates = study["mixes"].get(name, {})
        annealed = name in study["mixes"]
        rows.append(
            [
                name,
                100 * rates.get("arithmetic", 0.0) if annealed else None,
                bits_per_byte(result, "arithmetic"),
                average_bits(result, rest),
                average_accuracy(result, math_tasks),
                average_accuracy_change(before, result, math_tasks) if annealed else None,
                average_accuracy(result, others),
                average_accuracy_change(before, result, others) if annealed else None,
            ]
        )
    columns = [
        "mix",
        Column("arithmetic %", 0),
        Column("arithmetic bits/byte", 3),
        Column("other bits/byte", 3),
        Column("math tasks %", 1),
        Column("change", 1, signed=True),
        Column("other tasks %", 1),
        Column("change", 1, signed=True),
    ]
    caption = f"{study['tokens']:,} tokens a run. ± one standard error; changes in pairs."
    return Table(columns, rows, title="Microanneals of this run", caption=caption)


def _published() -> Table:
    table = published.load()["microanneals"]
    rows = [
        [name, web, None if tokens is None else f"{tokens / 1e9:g}B", mmlu, gsm]
        for name, web, tokens, mmlu, gsm in table["rows"]
    ]
    columns = ["run", Column("web %", 1), "tokens", Column("MMLU", 1), Column("GSM*", 1)]
    caption = f"{published.load()['paper']}, {table['source'].lower()}. {table['note']}"
    return Table(columns, rows, title="The paper's microanneals (7B)", caption=caption)
