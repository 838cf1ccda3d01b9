"""What the evaluation results say: differences with standard errors, and findings from them.

Nothing here knows what came out; every sentence is made from the numbers it is given.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments.olmo2.evaluate import (
    above_guessing,
    accuracy,
    accuracy_change,
    answer_bits,
    answer_bits_change,
    bits_per_byte,
    bits_per_byte_change,
)
from experiments.olmo2.suite import MATH_TASKS, WORDED_TASKS
from olmax.reporting import estimates
from olmax.reporting.document import Finding
from olmax.reporting.estimates import Estimate, judge

Result = Mapping[str, Any]
MATH_SOURCE = "arithmetic"
BEFORE, AFTER = "pretrained", "soup"


def mean_result(results: Sequence[Result]) -> dict[str, Any]:
    """The average of several models, document by document and question by question."""

    def mean(columns: Sequence[Sequence[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*columns, strict=True)]

    first = results[0]
    return {
        "sources": {
            name: {
                "bits": mean([r["sources"][name]["bits"] for r in results]),
                "bytes": first["sources"][name]["bytes"],
            }
            for name in first["sources"]
        },
        "tasks": {
            name: task
            | {
                key: mean([r["tasks"][name][key] for r in results])
                for key in ("correct", "bits_per_byte")
            }
            for name, task in first["tasks"].items()
        },
    }


def average_bits(result: Result, sources: Sequence[str]) -> Estimate:
    """Bits per byte, mean over sources."""
    return estimates.average([bits_per_byte(result, source) for source in sources])


def average_bits_change(before: Result, after: Result, sources: Sequence[str]) -> Estimate:
    """Paired difference of bits per byte, mean over sources."""
    return estimates.average([bits_per_byte_change(before, after, s) for s in sources])


def average_accuracy(result: Result, tasks: Sequence[str]) -> Estimate:
    """Accuracy in percent, mean over tasks."""
    return estimates.average([accuracy(result, task) for task in tasks])


def average_accuracy_change(before: Result, after: Result, tasks: Sequence[str]) -> Estimate:
    """Paired difference of accuracies in percentage points, mean over tasks."""
    return estimates.average([accuracy_change(before, after, task) for task in tasks])


def best_ingredient(results: Mapping[str, Result], sources: Sequence[str]) -> str:
    """The ingredient with the fewest bits per byte over `sources`."""
    names = ingredients(results)
    return min(names, key=lambda name: average_bits(results[name], sources).value)


def ingredients(results: Mapping[str, Result]) -> list[str]:
    """Names of the annealing runs."""
    return [name for name in results if name not in (BEFORE, AFTER)]


def average_answer_bits(result: Result, tasks: Sequence[str]) -> Estimate:
    """Bits per byte of the right answers, mean over tasks."""
    return estimates.average([answer_bits(result, task) for task in tasks])


def average_answer_bits_change(before: Result, after: Result, tasks: Sequence[str]) -> Estimate:
    """Paired difference of bits per byte of the right answers, mean over tasks."""
    return estimates.average([answer_bits_change(before, after, task) for task in tasks])


def findings(results: Mapping[str, Result], annealed: Sequence[str]) -> list[Finding]:
    """The paper's effects, each with the verdict that the measurements give.

    Benchmarks are judged by the bits per byte of the right answers, as the paper advises for small
    models (appendix B.1), and by accuracy only where some model does better than guessing.

    Args:
      results: evaluation by model: `pretrained`, the ingredients, `soup`.
      annealed: sources of the annealing mix.
    """
    before, after = results[BEFORE], results[AFTER]
    names = ingredients(results)
    mean = mean_result([results[name] for name in names])
    worded = list(WORDED_TASKS)
    others = [task for task in worded if task not in MATH_TASKS]
    rest = [source for source in before["sources"] if source != MATH_SOURCE]
    runs = f"mean of {len(names)} annealing runs against the pretrained model"
    found = [
        _finding(
            "Annealing makes the text of its mix easier to predict",
            average_bits_change(before, mean, annealed),
            "down",
            f"bits per byte on held-out {_list(annealed)}, {runs}",
            3,
        ),
        _finding(
            "Annealing makes the right answers of the benchmarks more likely",
            average_answer_bits_change(before, mean, worded),
            "down",
            f"bits per byte of the right answers, average of {len(worded)} tasks, {runs}",
            3,
        ),
        _accuracy_finding(results, mean, runs),
        _finding(
            "Annealing improves math most: held-out text",
            _difference(
                average_bits_change(before, mean, rest),
                bits_per_byte_change(before, mean, MATH_SOURCE),
            ),
            "down",
            f"bits per byte: change on {MATH_SOURCE} minus the average change on {_list(rest)}",
            3,
        ),
        _finding(
            "Annealing improves math most: benchmarks",
            _difference(
                average_answer_bits_change(before, mean, others),
                average_answer_bits_change(before, mean, MATH_TASKS),
            ),
            "down",
            f"bits per byte of the right answers: change on {_list(MATH_TASKS)} minus the average "
            f"change on {_list(others)}",
            3,
        ),
    ]
    if len(names) > 1:
        best = best_ingredient(results, annealed)
        found += [
            _finding(
                "The soup predicts held-out text better than its ingredients do on average",
                average_bits_change(mean, after, annealed),
                "down",
                f"bits per byte on held-out {_list(annealed)}, soup against the mean of its "
                "ingredients",
                4,
            ),
            _finding(
                "The soup predicts held-out text better than the best of its ingredients",
                average_bits_change(results[best], after, annealed),
                "down",
                f"bits per byte on held-out {_list(annealed)}, soup against {best}, the best of "
                "them by this very number",
                4,
            ),
            _finding(
                "The soup makes right answers more likely than its ingredients do on average",
                average_answer_bits_change(mean, after, worded),
                "down",
                f"bits per byte of the right answers, average of {len(worded)} tasks",
                4,
            ),
        ]
    return found


def _accuracy_finding(results: Mapping[str, Result], mean: Result, runs: str) -> Finding:
    claim = "Annealing improves the accuracy on the benchmarks"
    before = results[BEFORE]
    tasks = [task for task in before["tasks"] if above_guessing(results.values(), task)]
    if not tasks:
        nothing = "no model is two standard errors above guessing on any task"
        return Finding(claim, "not shown", nothing)
    which = f"{_list(tasks)}, where some model is above guessing"
    change = average_accuracy_change(before, mean, tasks)
    return _finding(claim, change, "up", f"percentage points on {which}; {runs}", 1)


def _difference(first: Estimate, second: Estimate) -> Estimate:
    """second - first of independent estimates."""
    stderr = (first.stderr**2 + second.stderr**2) ** 0.5
    return Estimate(second.value - first.value, stderr, first.n + second.n)


def _finding(
    claim: str, difference: Estimate, expected: Literal["up", "down"], what: str, digits: int
) -> Finding:
    return Finding(
        claim,
        judge(difference, expected=expected),
        f"{difference.text(digits, signed=True)} {what}",
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)
