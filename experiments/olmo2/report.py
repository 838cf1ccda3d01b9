"""Stage report: a table in the terminal, report.html and report.json."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from experiments.olmo2 import figures, microanneal, published, stability, suite
from experiments.olmo2.comparison import (
    AFTER,
    BEFORE,
    average_accuracy,
    average_accuracy_change,
    average_answer_bits,
    average_answer_bits_change,
    average_bits,
    average_bits_change,
    best_ingredient,
    findings,
    ingredients,
    mean_result,
)
from experiments.olmo2.dry_run import mix_rates, plan, resolved, short
from experiments.olmo2.evaluate import (
    accuracy,
    accuracy_change,
    answer_bits,
    bits_per_byte,
    bits_per_byte_change,
)
from experiments.olmo2.preparation import data_directory
from experiments.olmo2.recipe import Recipe, ingredient_name
from experiments.olmo2.training_stages import PRETRAIN, SOUP, ingredient_directory
from olmax.data.prepared import Manifest
from olmax.reporting.document import (
    Block,
    Code,
    Figure,
    Findings,
    KeyNumbers,
    Report,
    Samples,
    Section,
    TableBlock,
    Text,
)
from olmax.reporting.estimates import STANDARD_ERRORS
from olmax.reporting.files import environment, jsonable, write_json
from olmax.reporting.tables import Column, Table
from olmax.training.recorder import read_metrics
from olmax.training.stability import spike_score

STUDIES = ("microanneal", "stability")


def write_report(
    recipe: Recipe,
    directory: pathlib.Path,
    results: Mapping[str, Any],
    seconds: Mapping[str, float],
    console: Console,
) -> None:
    """Writes report.json, report.html and main.png, and prints the tables.

    Args:
      recipe: of the run.
      directory: the run directory.
      results: evaluation by model (see `evaluate.evaluate_model`).
      seconds: wall time by stage.
      console: where the tables go.
    """
    pretrain = read_metrics(directory / PRETRAIN)
    anneals = {
        ingredient_name(number): read_metrics(ingredient_directory(directory, number))
        for number in range(len(recipe.anneal.ingredients))
    }
    studies = {}
    for name in STUDIES:
        path = directory / name / "results.json"
        if path.exists():
            studies[name] = json.loads(path.read_text())
    numbers = collect(recipe, directory, results, seconds, pretrain, anneals, studies)
    write_json(directory / "report.json", numbers)
    report = build(recipe, numbers)
    report.write(directory / "report.html")
    figures.write_main_figure(directory / "report.json", directory / "main.png")
    for table in (held_out_table(numbers), benchmark_table(numbers), soup_table(numbers)):
        console.print(table.rich())
    for finding in findings(numbers["evaluation"], numbers["annealed_sources"]):
        console.print(f"[bold]{finding.verdict:>9}[/]  {finding.claim}", highlight=False)
        console.print(f"           {finding.evidence}", highlight=False, style="dim")
    minutes = sum(seconds.values()) / 60
    console.print(f"{minutes:.1f} minutes in all stages", highlight=False)
    console.print(f"report: {directory / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"soup:   olmax generate --model {directory / SOUP} --prompt TEXT",
                  highlight=False, soft_wrap=True)  # fmt: skip


def collect(
    recipe: Recipe,
    directory: pathlib.Path,
    results: Mapping[str, Any],
    seconds: Mapping[str, float],
    pretrain: figures.Rows,
    anneals: Mapping[str, figures.Rows],
    studies: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything the report is made from, as plain JSON: contents of report.json."""
    anneal_mix = recipe.anneal.ingredients[0].mix
    rates = {mix: mix_rates(recipe, mix) for mix in (recipe.pretrain_mix, anneal_mix)}
    sources = list(results[BEFORE]["sources"])
    annealed = [source for source in sources if rates[anneal_mix].get(source)]
    mean = mean_result([results[name] for name in ingredients(results)])
    manifest = Manifest.read(data_directory(recipe, recipe.pretrain_mix, directory))
    everyone = {**results, "mean of annealing runs": mean}
    runs = {"pretrain": pretrain, **anneals}
    numbers = {
        "recipe": json.loads(resolved(recipe)),
        "plan": plan(recipe),
        "environment": environment(),
        "seconds": dict(seconds),
        "data": manifest,
        "mix_rates": rates,
        "annealed_sources": annealed,
        "shares": _shares(rates[recipe.pretrain_mix], rates[anneal_mix], sources),
        "training": {name: _training_numbers(rows) for name, rows in runs.items()},
        "bits_per_byte": {
            name: {s: bits_per_byte(result, s) for s in sources}
            | {"annealing mix": average_bits(result, annealed)}
            for name, result in everyone.items()
        },
        "accuracy": {
            name: {t: accuracy(result, t) for t in suite.METRICS}
            | {"average": average_accuracy(result, list(suite.METRICS))}
            for name, result in everyone.items()
        },
        "answer_bits_per_byte": {
            name: {t: answer_bits(result, t) for t in suite.METRICS}
            for name, result in everyone.items()
        },
        "findings": findings(results, annealed),
        "studies": studies,
        "curves": {"pretrain": _thinned(pretrain), "anneal": {n: _thinned(r) for n, r in
                                                              anneals.items()}},
        "evaluation": results,
    }  # fmt: skip
    return jsonable(numbers)


def _shares(
    before: Mapping[str, float], after: Mapping[str, float], sources: list[str]
) -> dict[str, str]:
    """`15 → 63 % of the mix` for each source."""
    return {
        source: f"{100 * before.get(source, 0):.0f} → {100 * after.get(source, 0):.0f} % of the mix"
        for source in sources
    }


def _thinned(rows: figures.Rows, limit: int = 1500) -> list[dict[str, Any]]:
    """At most about `limit` rows for the curves; evaluations all stay."""
    stride = math.ceil(len(rows) / limit)
    keep = [row for i, row in enumerate(rows) if i % stride == 0 or "tokens" not in row]
    wanted = ("step", "tokens", "loss", "cross_entropy", "learning_rate", "grad_norm")
    return [
        {k: v for k, v in row.items() if k in wanted or k.startswith("held_out/")} for row in keep
    ]


def _training_numbers(rows: figures.Rows) -> dict[str, Any]:
    steps = [row for row in rows if "loss" in row]
    speeds = [row["tokens_per_second"] for row in steps if row.get("tokens_per_second")]
    last = steps[-max(1, len(steps) // 20) :]
    return {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["tokens"],
        "first_learning_rate": steps[0]["learning_rate"],
        "last_learning_rate": steps[-1]["learning_rate"],
        "last_cross_entropy": sum(row["cross_entropy"] for row in last) / len(last),
        "median_tokens_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
        "loss_spike_score": spike_score([row["loss"] for row in steps]),
        "grad_norm_spike_score": spike_score([row["grad_norm"] for row in steps]),
    }


def held_out_table(numbers: Mapping[str, Any]) -> Table:
    """Bits per byte by source: before, annealing runs, soup, and the paired change."""
    results, annealed = numbers["evaluation"], numbers["annealed_sources"]
    before, after = results[BEFORE], results[AFTER]
    mean = mean_result([results[name] for name in ingredients(results)])
    rows: list[list[Any]] = [
        [
            source,
            len(before["sources"][source]["bits"]),
            bits_per_byte(before, source),
            bits_per_byte(mean, source),
            bits_per_byte(after, source),
            bits_per_byte_change(before, after, source),
        ]
        for source in before["sources"]
    ]
    rows.append(
        [
            "annealing mix",
            sum(row[1] for row in rows if row[0] in annealed),
            average_bits(before, annealed),
            average_bits(mean, annealed),
            average_bits(after, annealed),
            average_bits_change(before, after, annealed),
        ]
    )
    columns = [
        "source",
        "documents",
        Column("pretrained", 3),
        Column("annealed (mean)", 3),
        Column("soup", 3),
        Column("change", 3, signed=True),
    ]
    caption = (
        "± one standard error over documents; change: soup minus pretrained, document by document. "
        "Last row: average of the sources in the annealing mix. Lower is better."
    )
    title = "Bits per byte on held-out text"
    return Table(columns, rows, title=title, caption=caption, strong_rows=[len(rows) - 1])


def benchmark_table(numbers: Mapping[str, Any]) -> Table:
    """Accuracy by task: chance, before, annealing runs, soup, and the paired change."""
    results = numbers["evaluation"]
    before, after = results[BEFORE], results[AFTER]
    mean = mean_result([results[name] for name in ingredients(results)])
    tasks = list(before["tasks"])
    rows: list[list[Any]] = [
        [
            task,
            len(before["tasks"][task]["correct"]),
            _chance(before, task),
            accuracy(before, task),
            accuracy(mean, task),
            accuracy(after, task),
            accuracy_change(before, after, task),
        ]
        for task in tasks
    ]
    rows.append(
        [
            "average",
            sum(row[1] for row in rows),
            sum(row[2] for row in rows) / len(rows),
            average_accuracy(before, tasks),
            average_accuracy(mean, tasks),
            average_accuracy(after, tasks),
            average_accuracy_change(before, after, tasks),
        ]
    )
    columns = [
        "task",
        "questions",
        Column("chance", 1),
        Column("pretrained", 1),
        Column("annealed (mean)", 1),
        Column("soup", 1),
        Column("change", 1, signed=True),
    ]
    caption = (
        "Accuracy in percent ± one standard error over questions; change: soup minus pretrained, "
        "question by question."
    )
    title = "Benchmarks before and after mid-training"
    return Table(columns, rows, title=title, caption=caption, strong_rows=[len(rows) - 1])


def _chance(result: Mapping[str, Any], task: str) -> float:
    guesses = result["tasks"][task]["chance"]
    return 100 * sum(guesses) / len(guesses)


def soup_table(numbers: Mapping[str, Any]) -> Table:
    """Every model in a row; the soup's paired differences to the best ingredient below."""
    results, annealed = numbers["evaluation"], numbers["annealed_sources"]
    tasks = list(suite.METRICS)
    others = [task for task in tasks if task not in suite.MATH_TASKS]
    math_tasks = list(suite.MATH_TASKS)

    def row(name: str, result: Mapping[str, Any]) -> list[Any]:
        return [
            name,
            average_bits(result, annealed),
            average_accuracy(result, tasks),
            average_accuracy(result, math_tasks),
            average_accuracy(result, others),
        ]

    best = best_ingredient(results, annealed)
    rows = [row(name, results[name]) for name in results]
    strong = [len(rows) - 1]
    after = results[AFTER]
    rows.append(
        [
            f"soup - {best}",
            average_bits_change(results[best], after, annealed).text(4, signed=True),
            average_accuracy_change(results[best], after, tasks).text(1, signed=True),
            average_accuracy_change(results[best], after, math_tasks).text(1, signed=True),
            average_accuracy_change(results[best], after, others).text(1, signed=True),
        ]
    )
    columns = [
        "model",
        Column("bits per byte", 4),
        Column("accuracy %", 1),
        Column("math tasks %", 1),
        Column("other tasks %", 1),
    ]
    caption = (
        f"Bits per byte: average over {', '.join(annealed)}. {best} is the ingredient with the "
        "fewest; the last row is the paired difference to it."
    )
    return Table(columns, rows, title="Ingredients and soup", caption=caption, strong_rows=strong)


def training_table(numbers: Mapping[str, Any]) -> Table:
    """Every training run: length, learning rate, last loss, speed, spikes."""
    seeds = {"pretrain": numbers["recipe"]["pretrain"]["seed"]}
    for ingredient in numbers["plan"]["ingredients"]:
        seeds[ingredient["name"]] = ingredient["seed"]
    rows = [
        [
            name,
            str(seeds.get(name, "")),
            run["steps"],
            short(run["tokens"]),
            f"{run['first_learning_rate']:.3g}",
            f"{run['last_learning_rate']:.3g}",
            run["last_cross_entropy"],
            run["median_tokens_per_second"] and round(run["median_tokens_per_second"]),
            run["loss_spike_score"],
            run["grad_norm_spike_score"],
        ]
        for name, run in numbers["training"].items()
    ]
    columns = [
        "run",
        "seed",
        "steps",
        "tokens",
        "first rate",
        "last rate",
        Column("last loss", 3),
        "tokens/s",
        Column("loss spikes %", 2),
        Column("gradient spikes %", 2),
    ]
    caption = (
        "Last loss: mean cross-entropy in nats per token over the last twentieth of the steps; "
        "pretraining and annealing runs read different mixes. Spikes: steps at least 7 standard "
        "deviations from the mean of up to 1000 steps before them."
    )
    return Table(columns, rows, title="Training runs", caption=caption)


def paper_tables(numbers: Mapping[str, Any]) -> list[Table]:
    """The paper's tables 9 and 14 with this run's numbers beside them."""
    paper = published.load()
    before, after = paper["before_mid_training"]["rows"], paper["base_models"]["rows"]
    columns = paper["base_models"]["columns"]
    wanted = ["average", "MMLU", "ARC-Challenge", "HellaSwag", "DROP", "GSM8K"]
    places = [columns.index(name) for name in wanted]
    rows: list[list[Any]] = []
    for model in before:
        rows.append([model, "before", *(before[model][i] for i in places)])
        rows.append(["", "after", *(after[model][i] for i in places)])
        rows.append(["", "change", *(after[model][i] - before[model][i] for i in places)])
    strong = [i for i in range(len(rows)) if rows[i][1] == "change"]
    mid = Table(
        ["model", Column("mid-training", align="left"), *(Column(name, 1) for name in wanted)],
        rows,
        title="The paper: base models before and after mid-training",
        caption=f"{paper['paper']}, tables 9 and 6. Percent; no standard errors are published.",
        strong_rows=strong,
    )
    results = numbers["evaluation"]
    first, last = results[BEFORE], results[AFTER]
    tasks = list(suite.METRICS)
    others = [task for task in tasks if task not in suite.MATH_TASKS]
    groups = {"all": tasks, "math": list(suite.MATH_TASKS), "other": others}
    worded = {
        "math": list(suite.MATH_TASKS),
        "other": [task for task in suite.WORDED_TASKS if task not in suite.MATH_TASKS],
    }
    ours = Table(
        [
            "this run",
            *(f"{name}, accuracy %" for name in groups),
            *(f"{name}, bits/byte of right answers" for name in worded),
        ],
        [
            [
                label,
                *(average_accuracy(result, group).text(1) for group in groups.values()),
                *(average_answer_bits(result, group).text(3) for group in worded.values()),
            ]
            for label, result in (("before", first), ("after (soup)", last))
        ]
        + [
            [
                "change",
                *(
                    average_accuracy_change(first, last, group).text(1, signed=True)
                    for group in groups.values()
                ),
                *(
                    average_answer_bits_change(first, last, group).text(3, signed=True)
                    for group in worded.values()
                ),
            ]
        ],
        title="This run: before and after mid-training",
        caption="± one standard error. Other tasks and other scales than the paper's; bits per "
        "byte fall where a model gets better.",
        strong_rows=[2],
    )
    soups = paper["soups"]
    scores = soups["columns"]
    soup_rows: list[list[Any]] = []
    for mix, pair in soups["rows"].items():
        change = [b - a for a, b in zip(pair["best_single"], pair["soup"], strict=True)]
        soup_rows.append([mix, *pair["best_single"], *change])
    souping = Table(
        ["mix", *(Column(f"{s}, best single", 1) for s in scores),
         *(Column(f"{s}, soup", 1, signed=True) for s in scores)],
        soup_rows,
        title="The paper: soups of three against the best single run",
        caption=f"{paper['paper']}, table 14. {soups['note']} The right half is the change.",
    )  # fmt: skip
    return [ours, mid, souping]


def build(recipe: Recipe, numbers: Mapping[str, Any]) -> Report:
    """The report from the contents of report.json."""
    results, curves = numbers["evaluation"], numbers["curves"]
    pretrain, anneals = curves["pretrain"], curves["anneal"]
    the_plan, env = numbers["plan"], numbers["environment"]
    seconds = sum(numbers["seconds"].values())
    count = len(numbers["plan"]["ingredients"])
    runs = "one annealing run" if count == 1 else f"{count} annealing runs"
    found = findings(results, numbers["annealed_sources"])
    pretrained_on = short(the_plan["pretrain_tokens"])
    overview: list[Block] = [
        Text(
            f"A byte-level BPE with {numbers['data']['vocab_size']:,} ids and a "
            f"{the_plan['parameters']:,}-parameter OLMo 2 model, trained from the texts that come "
            f"with Python {env['python']} and from generated arithmetic. {pretrained_on} "
            f"tokens of pretraining with the learning rate's cosine cut short, then {runs} of "
            f"{short(the_plan['ingredients'][0]['tokens'])} tokens on a mix with more "
            "documentation and arithmetic, each from the same checkpoint with its optimizer state, "
            "the learning rate falling linearly to zero; the soup is the mean of their parameters."
        ),
        KeyNumbers(
            [
                (f"{seconds / 60:.1f} min", f"all stages on {env['cpus']} CPU cores"),
                (f"{the_plan['parameters'] / 1e6:.2f} M", "parameters"),
                (short(the_plan["model_tokens"]), "tokens behind the soup"),
                (f"{the_plan['flops']:.1e}", "training FLOPs, 6 x parameters x tokens"),
            ]
        ),
        Figure(
            figures.main_figure(pretrain, anneals, results, numbers["shares"]),
            "Left: training loss (faint: every step) with the learning rate behind it; the dashed "
            "line is where annealing starts on another mix. Middle and right: the pretrained "
            "model, the annealing runs and their soup.",
            "Training loss over tokens, bits per byte by source and of right answers by task, "
            "before and after annealing",
        ),
        Findings(found),
        Text(
            f"A finding is shown when its difference is at least {STANDARD_ERRORS:g} standard "
            "errors from zero in the direction the paper reports, reversed when as far in the "
            "other, not shown otherwise. Standard errors are over documents and questions: there "
            "is one pretraining run, so they say nothing about another seed of it."
        ),
    ]
    training: list[Block] = [
        Figure(
            figures.training_figure(pretrain, anneals),
            "Cross-entropy, learning rate and gradient norm at every step; annealing runs start "
            "where pretraining ends.",
            "Three stacked curves over tokens: training loss, learning rate, gradient norm",
        ),
        TableBlock(training_table(numbers)),
    ]
    held_out: list[Block] = []
    if (figure := figures.held_out_figure(pretrain, anneals)) is not None:
        held_out.append(
            Figure(
                figure,
                "Looked at during training on the beginnings of a few held-out documents of each "
                "source; the table below uses more text.",
                "Bits per byte of each source against training tokens",
            )
        )
    held_out += [TableBlock(held_out_table(numbers)), TableBlock(_mix_table(numbers))]
    benchmarks: list[Block] = [
        Figure(
            figures.benchmark_figure(results),
            "Left: how likely the right answers are, in tasks with worded answers. Right: how "
            "often they are the likeliest choice. Where a model guesses, the left side says more.",
            "Bits per byte of the right answers and accuracy by task, before and after annealing",
        ),
        TableBlock(benchmark_table(numbers)),
        TableBlock(_answer_table(numbers)),
        TableBlock(_task_table(results)),
    ]
    comparison: list[Block] = [TableBlock(table) for table in paper_tables(numbers)]
    sections = [
        Section("What came out", overview),
        Section("Training", training),
        Section("Held-out text", held_out),
        Section("Benchmarks", benchmarks),
        Section("Ingredients and soup", [TableBlock(soup_table(numbers))]),
        Section("Beside the paper", comparison),
        *(_study_section(name, study) for name, study in numbers["studies"].items()),
        Section("Samples", _samples(results)),
        Section("How it was made", _provenance(recipe, numbers)),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return Report(
        title="OLMo 2 in miniature",
        subtitle=f"Preset {recipe.name}: pretraining, annealing, soup and evaluation, "
        "as measured in this run.",
        sections=sections,
        footer=f"Python {env['python']}, {versions}; {env['devices']} x {env['device']} "
        f"({env['platform']}, {env['cpus']} cores).",
    )


def _mix_table(numbers: Mapping[str, Any]) -> Table:
    rates = numbers["mix_rates"]
    sources = numbers["data"]["sources"]
    rows = [
        [
            source["name"],
            source["documents"],
            source["tokens"],
            source["text_bytes"] / source["tokens"],
            *(100 * rate.get(source["name"], 0.0) for rate in rates.values()),
        ]
        for source in sources
    ]
    columns = [
        "source",
        "documents",
        "tokens",
        Column("bytes/token", 2),
        *(Column(f"{mix} mix %", 1) for mix in rates),
    ]
    return Table(columns, rows, title="Training data")


def _answer_table(numbers: Mapping[str, Any]) -> Table:
    results = numbers["evaluation"]
    models = [BEFORE, *ingredients(results), AFTER]
    rows = [[t, *(answer_bits(results[m], t).value for m in models)] for t in suite.METRICS]
    return Table(
        ["task", *(Column(model, 3) for model in models)],
        rows,
        title="Bits per byte of the right answers",
        caption="Mean over questions; lower is better.",
    )


def _task_table(results: Mapping[str, Any]) -> Table:
    rows = [
        [name, text, results[BEFORE]["tasks"][name]["metric"]]
        for name, text in suite.DESCRIPTIONS.items()
    ]
    columns = ["task", Column("question", align="left"), Column("metric", align="left")]
    return Table(columns, rows, title="Tasks", caption="All made from held-out text; four choices.")


def _samples(results: Mapping[str, Any]) -> list[Block]:
    items = [
        (name, sample["prompt"], sample["text"])
        for index in range(len(results[BEFORE]["samples"]))
        for name, sample in (
            ("pretrained", results[BEFORE]["samples"][index]),
            ("soup", results[AFTER]["samples"][index]),
        )
    ]
    return [Text("Greedy continuations; the prompt is in bold."), Samples(items)]


def _study_section(name: str, study: Mapping[str, Any]) -> Section:
    module = {"microanneal": microanneal, "stability": stability}[name]
    return Section(module.TITLE, module.blocks(study))


def _provenance(recipe: Recipe, numbers: Mapping[str, Any]) -> list[Block]:
    seconds = numbers["seconds"]
    times = Table(
        ["stage", Column("seconds", 1)],
        [*seconds.items(), ("all", sum(seconds.values()))],
        title="Wall time",
        caption="Compilation included. A stage that was interrupted counts its last start.",
        strong_rows=[len(seconds)],
    )
    return [
        *(Text(note) for note in recipe.notes),
        TableBlock(times),
        Code(json.dumps(numbers["recipe"], indent=2), summary="Resolved configuration"),
        Code(json.dumps(numbers["environment"], indent=2), summary="Environment"),
    ]
