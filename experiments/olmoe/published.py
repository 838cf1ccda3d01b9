"""Numbers of the OLMoE paper that reports are compared with, and its routing tables made anew."""

import csv
import functools
import json
import os
import pathlib
from typing import Any

from rich.console import Console

from olmax.errors import UserError
from olmax.reporting.tables import Column, Table
from olmax.routing.analysis import domain_summary

PATH = pathlib.Path(__file__).with_name("published.json")
LAYERS = (0, 7, 15)
"""Layers whose routing counts were released."""


@functools.cache
def load() -> dict[str, Any]:
    """Contents of published.json; every table names its source."""
    return json.loads(PATH.read_text())


def read_counts(path: pathlib.Path) -> dict[tuple[str, str, str, int], list[int]]:
    """Released routing counts by (model, selection, domain, layer), one count an expert."""
    found: dict[tuple[str, str, str, int], list[int]] = {}
    with path.open() as stream:
        for row in csv.DictReader(stream):
            key = (row["model"], row["selection"], row["domain"], int(row["layer"]))
            counts = found.setdefault(key, [])
            assert int(row["expert"]) == len(counts), "experts are listed in order"
            counts.append(int(row["count"]))
    return found


def domain_table(counts: dict[tuple[str, str, str, int], list[int]], model: str) -> Table:
    """Section 4's table of domain specialisation for one model, from its counts."""
    selection = "top2" if model == "mistral" else "top8"
    domains = [key[2] for key in counts if key[:2] == (model, selection) and key[3] == LAYERS[0]]
    rows = []
    for domain in domains:
        row: list[Any] = [domain]
        for layer in LAYERS:
            found = domain_summary(counts[model, selection, domain, layer], int(selection[3:]))
            row += [f"{found['max']:.1f} ({found['expert']})", found["std"]]
        rows.append([*row, found["above_twice_uniform"]])
    columns = ["domain"]
    for layer in LAYERS:
        columns += [f"layer {layer} max (expert)", Column(f"std {layer}", 1)]
    return Table(
        [*columns, f"layer {LAYERS[-1]}: above twice uniform"],
        rows,
        title=f"Domain specialisation of {model}, {selection} (%)",
    )


def print_routing_tables(console: Console) -> None:
    """Prints those tables for every model of the released counts.

    Raises:
      UserError: the counts are not there.
    """
    root = pathlib.Path(os.environ.get("OLMAX_DATA_DIR", PATH.parents[3] / "shared" / "data"))
    path = root / "olmoe_routing" / "expert_counts.csv"
    if not path.exists():
        raise UserError(
            f"{path}: no routing counts there; set OLMAX_DATA_DIR to the folder that holds "
            "olmoe_routing/expert_counts.csv (allenai/OLMoE: scripts/routing_output)"
        )
    counts = read_counts(path)
    for model in dict.fromkeys(key[0] for key in counts):
        console.print(domain_table(counts, model).rich())
