"""Metrics of scored questions (specs/olmo2.md sections 9.1 and 9.4).

Names follow OLMES: `acc_raw` picks the choice with the highest log-likelihood, `acc_per_char`,
`acc_per_byte` and `acc_per_token` divide it by the length of the continuation (its leading space
included), `acc_uncond` subtracts the log-likelihood of the continuation under the unconditional
context (pmi). `bits_per_byte` looks at the right answer alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from olmax.reporting import estimates
from olmax.reporting.estimates import Estimate

ACCURACIES = ("acc_raw", "acc_per_char", "acc_per_byte", "acc_per_token", "acc_uncond")


@dataclasses.dataclass(frozen=True)
class ScoredChoice:
    """Log-likelihood of one choice and what it may be divided by."""

    logprob: float
    tokens: int
    chars: int
    bytes: int
    unconditional: float | None = None
    """Log-likelihood under the unconditional context, where it was asked for."""


@dataclasses.dataclass(frozen=True)
class ScoredQuestion:
    """The choices of one question and which of them is right."""

    choices: tuple[ScoredChoice, ...]
    gold: int


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits per UTF-8 byte of a text whose negative log-likelihood is `nats`."""
    return nats / (num_bytes * math.log(2))


def question_metrics(question: ScoredQuestion) -> dict[str, float]:
    """Metrics of one question.

    Accuracies are 1 when the right choice has the highest value. Choices that tie for it share the
    credit, so that a model that cannot tell them apart has the accuracy of guessing. `soft` is the
    probability of the right choice when the choices' probabilities are made to sum to 1, `soft_log`
    its logarithm. A question with one choice has `bits_per_byte` alone.
    """
    gold = question.choices[question.gold]
    metrics = {"bits_per_byte": bits_per_byte(-gold.logprob, gold.bytes)}
    if len(question.choices) < 2:
        return metrics
    logprobs = np.array([choice.logprob for choice in question.choices])

    def per(attribute: str) -> np.ndarray:
        return logprobs / [getattr(choice, attribute) for choice in question.choices]

    values = {
        "acc_raw": logprobs,
        "acc_per_char": per("chars"),
        "acc_per_byte": per("bytes"),
        "acc_per_token": per("tokens"),
    }
    unconditional = [choice.unconditional for choice in question.choices]
    if None not in unconditional:
        values["acc_uncond"] = logprobs - np.array(unconditional, float)
    for name, x in values.items():
        best = x == x.max()
        metrics[name] = float(best[question.gold] / best.sum())
    metrics["soft_log"] = float(logprobs[question.gold] - np.logaddexp.reduce(logprobs))
    metrics["soft"] = math.exp(metrics["soft_log"])
    return metrics


def aggregate(questions: Sequence[ScoredQuestion]) -> dict[str, Estimate]:
    """Mean of every metric over the questions that have it, with its standard error.

    `bits_per_byte` is the mean over questions (as OLMES has it), `bits_per_byte_micro` all bits
    over all bytes. `chance` is the accuracy of guessing.
    """
    rows = [question_metrics(question) for question in questions]
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: estimates.mean([row[name] for row in rows if name in row]) for name in names}
    golds = [question.choices[question.gold] for question in questions]
    found["bits_per_byte_micro"] = estimates.ratio(
        [-gold.logprob / math.log(2) for gold in golds], [gold.bytes for gold in golds]
    )
    if "acc_raw" in found:
        guesses = [1 / len(q.choices) for q in questions if len(q.choices) > 1]
        found["chance"] = Estimate(float(np.mean(guesses)), 0.0, len(guesses))
    return found


def macro_average(tasks: Sequence[Estimate]) -> Estimate:
    """Mean over tasks, each counting the same."""
    return estimates.average(tasks)


def micro_average(tasks: Sequence[Estimate]) -> Estimate:
    """Mean over the questions of all tasks."""
    n = sum(task.n for task in tasks)
    value = sum(task.value * task.n for task in tasks) / n
    stderr = math.sqrt(sum((task.stderr * task.n) ** 2 for task in tasks)) / n
    return Estimate(value, stderr, n)


_LENGTH_NORMALISED = (
    "arc_challenge",
    "arc_easy",
    "csqa",
    "hellaswag",
    "openbookqa",
    "piqa",
    "socialiqa",
    "winogrande",
)
_RAW = ("boolq", "basic_skills", "copycolors", "sciq")


def primary_metric(name: str, has_choices: bool, settings: Mapping[str, object]) -> str:
    """The metric that a task is judged by.

    For the tasks of OLMo 2's evaluation as AI2's in-loop code has it: `bits_per_byte` where there
    is one reference answer, `acc_raw` for multiple choice by label and for BoolQ, SciQ, basic
    skills and copycolors, `acc_per_char` for the other cloze tasks. For others `primary_metric` of
    the file's settings, else `acc_per_char`.
    """
    if not has_choices:
        return "bits_per_byte"
    if "_mc_" in f"_{name}_" or name.startswith(_RAW):
        return "acc_raw"
    if name.startswith(_LENGTH_NORMALISED):
        return "acc_per_char"
    told = settings.get("primary_metric")
    return told if isinstance(told, str) and told in ACCURACIES[:-1] else "acc_per_char"
