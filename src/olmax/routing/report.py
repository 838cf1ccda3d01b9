"""Tables, figures and sections of a routing analysis."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from olmax.reporting import document
from olmax.reporting.document import Block, Section, TableBlock, Text
from olmax.reporting.figures import PALETTE, label_lines, panels, style
from olmax.reporting.tables import Column, Table

Found = Mapping[str, Any]
"""What `analysis.analyse` returns."""


def sections(found: Found, *, names: Mapping[int, str] | None = None) -> list[Section]:
    """The analysis as sections of a report; `names` spells token ids."""
    uniform = 100 * found["experts_per_token"] / found["n_experts"]
    first = [
        Text(
            f"{found['tokens']:,} tokens, {found['n_experts']} experts of which every token goes "
            f"to {found['experts_per_token']}: with random routing {uniform:.1f} % of the tokens "
            "go to each expert."
        ),
        document.Figure(load_figure(found), "Load of every expert, of an equal share.",
                        "Bars of the load of each expert, one panel a layer"),
        TableBlock(load_table(found)),
    ]  # fmt: skip
    result = [Section("Expert load", first)]
    if found["saturation"]:
        blocks: list[Block] = [
            document.Figure(
                saturation_figure(found),
                "Share of the final checkpoint's experts that earlier checkpoints chose too.",
                "Lines of router saturation over checkpoints, one a layer",
            ),
            TableBlock(saturation_table(found)),
        ]
        result.append(Section("Router saturation", blocks))
    result.append(
        Section(
            "Expert co-activation",
            [
                document.Figure(
                    coactivation_figure(found),
                    "Of the tokens sent to the row's expert, the share also sent to the column's; "
                    "the experts with the highest shares.",
                    "Heat maps of co-activation, one a layer",
                ),
                TableBlock(coactivation_table(found)),
            ],
        )
    )
    if len(found["tokens_by_domain"]) > 1:
        blocks = [
            document.Figure(
                domain_figure(found),
                "Share of a domain's tokens that each expert gets; the line is random routing.",
                "Bars of domain specialisation by expert, one panel a layer",
            ),
            TableBlock(domain_table(found)),
        ]
        result.append(Section("Domain specialisation", blocks))
    blocks = [TableBlock(vocabulary_table(found))]
    if names is not None:
        blocks.append(TableBlock(favourites_table(found, names)))
    result.append(Section("Vocabulary specialisation", blocks))
    return result


def load_table(found: Found) -> Table:
    """Fullest and emptiest expert of every layer."""
    return Table(
        ["layer", Column("fullest %", 0), Column("emptiest %", 0), "dead experts"],
        [
            [str(layer), load["max"], load["min"], load["dead"]]
            for layer, load in enumerate(found["load"])
        ],
        title="Expert load",
        caption="In percent of an equal share.",
    )


def saturation_table(found: Found) -> Table:
    """Saturation by checkpoint and layer, for the most likely expert and for all k."""
    layers = range(len(found["load"]))
    k = found["experts_per_token"]
    rows = [
        [f"{name}, top-{k if top == 'k' else top}", *values[top], float(np.mean(values[top]))]
        for top in ("1", "k")
        for name, values in found["saturation"].items()
    ]
    return Table(
        ["checkpoint", *(Column(f"layer {n}", 1) for n in layers), Column("mean", 1)],
        rows,
        title="Router saturation (%)",
        caption=f"Random routers: {100 / found['n_experts']:.1f} for top-1, "
        f"{100 * k / found['n_experts']:.1f} for top-{k}.",
    )


def coactivation_table(found: Found) -> Table:
    """Highest and mean co-activation of the experts shown."""
    rows = [
        [f"layer {layer}, {pairs} pairs", values["max"], values["mean"]]
        for layer, kinds in found["coactivation"].items()
        for pairs, values in kinds.items()
    ]
    return Table(
        ["", Column("highest %", 1), Column("mean of the shown %", 1)],
        rows,
        title="Expert co-activation",
        caption="all: the paper's formula; adjacent: only neighbours in a token's ranking, as the "
        "published heat maps were computed.",
    )


def domain_table(found: Found) -> Table:
    """The most specialised expert of each layer and domain."""
    uniform = 100 * found["experts_per_token"] / found["n_experts"]
    rows = []
    for layer, domains in found["domain_specialization"].items():
        for domain, values in domains.items():
            values_E = np.asarray(values)
            rows.append(
                [
                    f"layer {layer}, {domain}", float(values_E.max()), int(values_E.argmax()),
                    float(values_E.std()), int(np.sum(values_E > 2 * uniform)),
                ]
            )  # fmt: skip
    return Table(
        ["", Column("highest %", 1), "expert", Column("std", 1), "above twice uniform"],
        rows,
        title="Domain specialisation",
        caption=f"Share of the domain's tokens that an expert gets; uniform: {uniform:.1f} %.",
    )


def vocabulary_table(found: Found) -> Table:
    """Vocabulary specialisation by layer."""
    layers = range(len(found["load"]))
    rows = [
        [name.replace("_", " "), *values, float(np.mean(values))]
        for name, values in found["vocabulary_specialization"].items()
    ]
    return Table(
        ["ids", *(Column(f"layer {n}", 1) for n in layers), Column("mean", 1)],
        rows,
        title="Vocabulary specialisation (%)",
        caption="Mean over distinct ids of the share of their occurrences that their favourite "
        "expert gets. Ids seen once count 100 %, so small samples inflate it.",
    )


def favourites_table(found: Found, names: Mapping[int, str]) -> Table:
    """Which ids the most specialised experts favour."""
    rows = [
        [
            f"layer {layer}, expert {expert}",
            values["percent"],
            "  ".join(f"{names.get(i, str(i))!r} ({share:.0f})" for i, share, _ in values["ids"]),
        ]
        for layer, experts in found["vocabulary"].items()
        for expert, values in experts.items()
    ]
    columns = ["", Column("mean %", 0), Column("input ids (share %)", align="left")]
    return Table(columns, rows, title="Favourite ids, of those seen at least ten times")


def load_figure(found: Found) -> Figure:
    """Load of every expert in the layers shown."""
    layers: Sequence[int] = found["layers"]
    with style():
        figure, axes = panels(1, len(layers), height=2.4, sharey=True)
        for axis, layer in zip(axes, layers, strict=True):
            values = sorted(found["load"][layer]["percent"], reverse=True)
            axis.bar(range(len(values)), values, color=PALETTE[0], width=0.8)
            axis.axhline(100, color=PALETTE[6], linewidth=0.8, linestyle=(0, (3, 3)))
            axis.set_title(f"Layer {layer}")
            axis.set_xlabel("experts, fullest first")
        axes[0].set_ylabel("% of an equal share")
        return figure


def saturation_figure(found: Found) -> Figure:
    """Saturation over checkpoints, one line a layer."""
    names = list(found["saturation"])
    k = found["experts_per_token"]
    with style():
        figure, axes = panels(1, 2, height=3.0, sharey=True)
        for axis, top in zip(axes, ("1", "k"), strict=True):
            values = np.asarray([found["saturation"][name][top] for name in names])
            places = list(range(len(names)))
            layers = range(len(found["load"]))
            colors = [PALETTE[i % len(PALETTE)] for i in layers]
            for layer, color in enumerate(colors):
                axis.plot(places, values[:, layer], color=color, marker="o", markersize=3)
            random = 100 * (k if top == "k" else 1) / found["n_experts"]
            axis.axhline(random, color=PALETTE[6], linewidth=0.8, linestyle=(0, (3, 3)))
            axis.set_xticks(places, names)
            axis.set_ylim(0, 100)
            axis.set_title(f"Router saturation, top-{k if top == 'k' else 1} (%)")
            ends = [(places[-1], float(values[-1, n])) for n in layers]
            label_lines(axis, [f"layer {n}" for n in layers], ends, colors)
        return figure


def coactivation_figure(found: Found) -> Figure:
    """Heat maps by the paper's formula, and by the code of its figures."""
    layers = list(found["coactivation"])
    with style():
        figure, axes = panels(2, len(layers), height=2.9)
        for row, pairs in enumerate(("all", "adjacent")):
            for column, layer in enumerate(layers):
                axis = axes[row * len(layers) + column]
                values = found["coactivation"][layer][pairs]
                image = axis.imshow(values["percent"], cmap="Blues", vmin=0, vmax=60)
                places = range(len(values["experts"]))
                axis.set_xticks(places, values["experts"], rotation=90, fontsize=6)
                axis.set_yticks(places, values["experts"], fontsize=6)
                axis.grid(visible=False)
                axis.set_title(f"Layer {layer}, {pairs} pairs (%)")
                if column == len(layers) - 1:
                    figure.colorbar(image, ax=axis, shrink=0.8)
        return figure


def domain_figure(found: Found) -> Figure:
    """Domain specialisation of every expert, one panel a layer."""
    layers = list(found["domain_specialization"])
    uniform = 100 * found["experts_per_token"] / found["n_experts"]
    with style():
        figure, axes = panels(len(layers), 1, height=2.0, sharex=True)
        for axis, layer in zip(axes, layers, strict=True):
            domains = found["domain_specialization"][layer]
            width = 0.8 / len(domains)
            for i, (domain, values) in enumerate(domains.items()):
                places = np.arange(len(values)) - 0.4 + (i + 0.5) * width
                axis.bar(places, values, width=width, label=domain, color=PALETTE[i % 7])
            axis.axhline(uniform, color=PALETTE[6], linewidth=0.8, linestyle=(0, (3, 3)))
            axis.set_title(f"Layer {layer}: % of the domain's tokens")
        axes[0].legend(ncols=len(domains), loc="upper right")
        axes[-1].set_xlabel("expert")
        return figure
