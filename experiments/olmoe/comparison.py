"""What the variants' numbers say about the paper's claims."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from experiments.olmoe.recipe import MAIN
from olmax.reporting import estimates
from olmax.reporting.document import Finding
from olmax.reporting.estimates import Estimate, judge

Results = Mapping[str, Mapping[str, Sequence[float]]]
"""Bits per byte by run, source and document."""


def bits(results: Results, run: str, source: str) -> Estimate:
    """Bits per byte on a source; standard error over documents."""
    return estimates.mean(results[run][source])


def average_bits(results: Results, run: str) -> Estimate:
    """Mean over sources."""
    return estimates.average([bits(results, run, source) for source in results[run]])


def average_change(results: Results, before: str, after: str) -> Estimate:
    """Paired difference of two runs, document by document, mean over sources."""
    return estimates.average(
        [
            estimates.mean_difference(results[before][source], results[after][source])
            for source in results[before]
        ]
    )


def findings(
    results: Results, training: Mapping[str, Mapping[str, Any]], routing: Mapping[str, Any]
) -> list[Finding]:
    """The paper's effects, each with the verdict that the measurements give.

    Args:
      results: held-out bits per byte.
      training: last values of the training metrics by run.
      routing: the main model's routing analysis.
    """
    found = []

    def compare(claim: str, before: str, after: str, expected: Literal["up", "down"]) -> None:
        if before in results and after in results:
            change = average_change(results, before, after)
            what = f"bits per byte on held-out text, {after} against {before}, mean over sources"
            evidence = f"{change.text(4, signed=True)} {what}"
            found.append(Finding(claim, judge(change, expected=expected), evidence))

    compare("Experts beat the dense model at equal active parameters", "dense", MAIN, "down")
    compare("Finer experts are better: 16 than 8", "8-experts", MAIN, "down")
    compare("Finer experts are better: 8 than 4", "4-experts", "8-experts", "down")
    compare("A shared expert does not help", MAIN, "shared", "up")
    compare("Tokens choosing experts beats experts choosing tokens", "expert-choice", MAIN, "down")
    compare("Balancing the load lowers the loss", "unbalanced", MAIN, "down")
    if "unbalanced" in training:
        found.append(_balance(training))
    found.append(_saturation(routing))
    found.append(_depth(routing))
    return found


def _balance(training: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Single numbers without a spread: shown when they differ by half."""
    with_loss = training[MAIN]["max_violation"]
    without = training["unbalanced"]["max_violation"]
    dead = training["unbalanced"]["min_load"]
    return Finding(
        "Without the load-balancing loss the load becomes uneven",
        "shown" if without > 1.5 * with_loss else "not shown",
        f"the fullest expert gets {1 + without:.2f} times its share without the loss and "
        f"{1 + with_loss:.2f} times with it (end of training, mean over layers); the emptiest "
        f"{dead:.2f} and {training[MAIN]['min_load']:.2f} times. One run each, no standard error.",
    )


def _saturation(routing: Mapping[str, Any]) -> Finding:
    claim = "Routing saturates early, and grows with training"
    means = {name: _mean(values["k"]) for name, values in routing["saturation"].items()}
    random = 100 * routing["experts_per_token"] / routing["n_experts"]
    values = list(means.values())
    rising = all(a < b for a, b in itertools.pairwise(values))
    early = bool(values) and values[0] > 1.5 * random
    listed = ", ".join(f"{value:.1f} % at {name}" for name, value in means.items())
    return Finding(
        claim,
        "shown" if rising and early else "not shown",
        f"share of the final experts chosen already, mean over layers: {listed}; random routing "
        f"gives {random:.1f} %",
    )


def _depth(routing: Mapping[str, Any]) -> Finding:
    """The paper: the first layer saturates last."""
    claim = "The first layer saturates more slowly than the others"
    if not routing["saturation"]:
        return Finding(claim, "not shown", "no earlier checkpoint")
    name, values = list(routing["saturation"].items())[-1]
    first, rest = values["k"][0], _mean(values["k"][1:])
    return Finding(
        claim,
        "shown" if first < rest else "not shown",
        f"at {name}: {first:.1f} % in layer 0, {rest:.1f} % on average behind it",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
