"""Stage evaluate: every model of a recipe on the same held-out text and questions.

Results are kept by document and by question, so that two models can be compared pair by pair.
"""

import math
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from experiments.olmo2.preparation import REQUESTS, read_held_out
from experiments.olmo2.recipe import Recipe
from olmax.data.tokenizer import Tokenizer
from olmax.evaluation.metrics import ScoredChoice, ScoredQuestion, question_metrics
from olmax.evaluation.requests import read_tasks
from olmax.evaluation.scoring import prefix_token, score
from olmax.evaluation.suite import encode_pairs
from olmax.generation.text import complete_text
from olmax.models.decoder import Decoder
from olmax.reporting import estimates
from olmax.reporting.estimates import Estimate, judge

BATCH_TOKENS = 8192

PROMPTS = (
    "Question: What is 12 + 7?\nAnswer:",
    "Question: Ana has 4 apples. Ben gives Ana 3 more. How many apples does Ana have now?\nAnswer:",
    'def read_file(path):\n    """',
    "The following statement",
)
"""Beginnings that the models continue in the report."""


def evaluate_model(
    model: Decoder, tokenizer: Tokenizer, recipe: Recipe, directory: pathlib.Path
) -> dict[str, Any]:
    """What `model` makes of the held-out documents and questions.

    Returns:
      `sources`: by source `bits` and `bytes` of each document. `tasks`: by task `correct` (the
      task's metric), `bits_per_byte` of the right answer and `chance`, each by question. `samples`:
      greedy continuations of `PROMPTS`.
    """
    documents = read_held_out(directory)
    tasks = read_tasks([directory / REQUESTS])
    texts = [text for group in documents.values() for text in group]
    questions = [question for task in tasks for question in task.questions]
    pairs = [([], ids) for ids in tokenizer.encode_batch(texts)]
    pairs += encode_pairs(
        tokenizer, [(c.context, c.continuation) for q in questions for c in q.choices]
    )
    scores = iter(
        score(
            model,
            pairs,
            prefix_id=prefix_token(tokenizer),
            # Tokens of a long document have at least half a context before them.
            stride=model.config.max_seq_len // 2,
            batch_tokens=BATCH_TOKENS,
            progress=sys.stderr.isatty(),
        )
    )
    sources = {}
    for name, group in documents.items():
        sources[name] = {
            "bits": [-next(scores).logprob / math.log(2) for _ in group],
            "bytes": [len(text.encode()) for text in group],
        }
    results = {}
    for task in tasks:
        metric = str(task.settings["primary_metric"])
        rows = []
        for question in task.questions:
            choices = []
            for choice in question.choices:
                got, text = next(scores), choice.continuation
                choices.append(ScoredChoice(got.logprob, got.tokens, len(text), len(text.encode())))
            rows.append(question_metrics(ScoredQuestion(tuple(choices), question.gold)))
        results[task.name] = {
            "metric": metric,
            "correct": [row[metric] for row in rows],
            "bits_per_byte": [row["bits_per_byte"] for row in rows],
            "chance": [1 / len(question.choices) for question in task.questions],
        }
    completions = complete_text(
        model, tokenizer, list(PROMPTS), max_new_tokens=recipe.evaluation.sample_tokens
    )
    samples = [
        {"prompt": prompt, "text": completion.text}
        for prompt, completion in zip(PROMPTS, completions, strict=True)
    ]
    return {"sources": sources, "tasks": results, "samples": samples}


def bits_per_byte(result: Mapping[str, Any], source: str) -> Estimate:
    """Bits per byte of the held-out documents of a source; standard error over documents."""
    found = result["sources"][source]
    return estimates.ratio(found["bits"], found["bytes"])


def bits_per_byte_change(before: Mapping, after: Mapping, source: str) -> Estimate:
    """Paired difference of two models' bits per byte."""
    old, new = before["sources"][source], after["sources"][source]
    return estimates.ratio_difference(old["bits"], new["bits"], old["bytes"])


def accuracy(result: Mapping[str, Any], task: str) -> Estimate:
    """Accuracy in percent; standard error over questions."""
    return estimates.mean(result["tasks"][task]["correct"]).scaled(100)


def accuracy_change(before: Mapping, after: Mapping, task: str) -> Estimate:
    """Paired difference of two models' accuracies, in percentage points."""
    return estimates.mean_difference(
        before["tasks"][task]["correct"], after["tasks"][task]["correct"]
    ).scaled(100)


def answer_bits(result: Mapping[str, Any], task: str) -> Estimate:
    """Bits per byte of the right answers, mean over questions."""
    return estimates.mean(result["tasks"][task]["bits_per_byte"])


def answer_bits_change(before: Mapping, after: Mapping, task: str) -> Estimate:
    """Paired difference of two models' bits per byte of the right answers."""
    return estimates.mean_difference(
        before["tasks"][task]["bits_per_byte"], after["tasks"][task]["bits_per_byte"]
    )


def above_guessing(results: Iterable[Mapping], task: str) -> bool:
    """Whether some model's accuracy is at least two standard errors above guessing."""
    for result in results:
        found = accuracy(result, task)
        chance = 100 * estimates.mean(result["tasks"][task]["chance"]).value
        if judge(Estimate(found.value - chance, found.stderr, found.n), expected="up") == "shown":
            return True
    return False
