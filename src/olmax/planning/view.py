"""A plan as tables, and as a page with its memory and its time."""

import math
from collections.abc import Sequence
from typing import Any

from olmax.reporting import figures
from olmax.reporting.document import Figure, KeyNumbers, Report, Section, TableBlock, Text
from olmax.reporting.tables import Column, Table

GIB = 2**30


def _mesh(plan: dict[str, Any]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in plan["mesh"].items()) or "one device"


def _title(plan: dict[str, Any]) -> str:
    slices = f"{plan['slices']} x " if plan["slices"] > 1 else ""
    return f"{plan['model']} on {slices}{plan['topology']}, {_mesh(plan)}"


def _error(plan: dict[str, Any]) -> str:
    if plan["mfu_error"] is None:
        return "how far plans are off is not known: none is calibrated"
    plans = "quick plans" if plan.get("quick") else "plans"
    return f"{plans} are off by {plan['mfu_error']:.0%} of the value over published runs"


def duration(days: float | None) -> str:
    """`12.3 days`, or hours below two days."""
    if days is None:
        return "-"
    return f"{days:,.1f} days" if days >= 2 else f"{days * 24:,.1f} hours"


def summary_text(plan: dict[str, Any]) -> str:
    """What was asked and the answer, for a terminal of any width."""
    rows = summary(plan).rows
    width = max(len(str(label)) for label, _ in rows)
    return "\n".join([_title(plan), *(f"  {label:<{width}}  {text}" for label, text in rows)])


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def summary(plan: dict[str, Any]) -> Table:
    """The same as a table."""
    b = plan["per_device_bytes"]
    rows: list[list[Any]] = [
        ["parameters", _count(plan["parameters"])],
        ["mesh", f"{_mesh(plan)} ({plan['devices']} devices)"],
        [
            "batch",
            f"{plan['batch_size']:,} x {plan['sequence_length']:,} tokens, remat {plan['remat']}"
            + (f", {plan['accumulation']} micro-batches" if plan["accumulation"] > 1 else ""),
        ],
        [
            "memory a device",
            f"{b['total'] / GIB:.2f} of {plan['hbm_bytes'] / GIB:.2f} GiB: "
            f"parameters {b['parameters'] / GIB:.2f}, optimizer {b['optimizer'] / GIB:.2f}, "
            f"activations {b['activations'] / GIB:.2f}, temporaries {b['temporaries'] / GIB:.2f}",
        ],
        ["verdict", plan["verdict"]],
    ]
    if plan.get("quick"):
        rows.append(
            [
                "quick",
                "memory and collectives as compiled; times from FLOPs and bytes; machine code of "
                "kernels not made, so whether it can be is not known",
            ]
        )
    if plan["step_seconds"] is not None:
        rows += [
            [
                "step",
                f"{plan['step_seconds']:.3f} s: {plan['cycles'] / 1e6:,.0f} Mcycles of computation "
                f"{plan['compute_seconds']:.3f}, kernels {plan['kernel_seconds']:.3f}, waiting for "
                f"links {plan['exposed_collective_seconds']:.3f}",
            ],
            [
                "MFU",
                f"{plan['mfu']:.1%} ({_error(plan)})",
            ],
            ["tokens a second and chip", f"{plan['tokens_per_second_per_chip']:,.0f}"],
            [
                "run",
                f"{plan['tokens']:.3g} tokens in {duration(plan['days'])}, "
                f"${plan['price']:,.0f} at ${plan['price_per_chip_hour']:.2f} a chip-hour",
            ],
        ]
    rows.append(["planned in", f"{plan['plan_seconds']:.0f} s"])
    columns = [Column("", align="left"), Column("", align="left")]
    return Table(columns, rows, title=_title(plan))


def collective_table(plan: dict[str, Any]) -> Table:
    """Collectives by kind and axes."""
    rows = [
        [
            row["kind"],
            ",".join(row["axes"]),
            row["calls"],
            row["bytes"] / GIB,
            row["seconds"] * 1e3,
            row["overlapped_seconds"] * 1e3,
        ]
        for row in plan["collectives"]
    ]
    columns = [
        "collective",
        Column("axes", align="left"),
        "calls a step",
        "GiB a step",
        Column("ms", digits=1),
        Column("beside computation", digits=1),
    ]
    return Table(columns, rows, title="Links, per device and step")


def part_table(plan: dict[str, Any]) -> Table:
    """Computation by part and pass, with the share of the peak."""
    total = sum(row["seconds"] for row in plan["parts"]) + plan["exposed_collective_seconds"]
    rows: list[list[Any]] = [
        [
            row["part"],
            row["phase"],
            row["cycles"] / 1e6,
            row["seconds"] * 1e3,
            row["seconds"] / total * 100,
            None if row["flops_share"] is None else row["flops_share"] * 100,
        ]
        for row in plan["parts"]
    ]
    waiting = plan["exposed_collective_seconds"]
    rows.append(["waiting for links", "", None, waiting * 1e3, waiting / total * 100, None])
    columns = [
        "part",
        Column("pass", align="left"),
        Column("Mcycles", digits=1),
        Column("ms", digits=1),
        Column("% of step", digits=1),
        Column("% of peak", digits=1),
    ]
    return Table(columns, rows, title="Where the time of a step goes")


_COMPARED = (
    ("Mcycles a step", "cycles", 1e-6, 0),
    ("step, s", "step_seconds", 1, 3),
    ("computation, s", "compute_seconds", 1, 3),
    ("kernels, s", "kernel_seconds", 1, 3),
    ("waiting for links, s", "exposed_collective_seconds", 1, 3),
    ("MFU, %", "mfu", 100, 1),
    ("tokens a second and chip", "tokens_per_second_per_chip", 1, 0),
    ("days", "days", 1, 2),
    ("price, $", "price", 1, 0),
)


def comparison(first: dict[str, Any], second: dict[str, Any], names: Sequence[str]) -> list[Table]:
    """Two plans side by side: totals, memory, parts."""
    rows: list[list[Any]] = []
    for label, key, scale, digits in _COMPARED:
        a, b = first.get(key), second.get(key)
        if a is not None and b is not None:
            rows.append(_compared(label, a * scale, b * scale, digits))
    for key in ("parameters", "optimizer", "activations", "temporaries", "total"):
        a, b = (plan["per_device_bytes"][key] / GIB for plan in (first, second))
        rows.append(_compared(f"{key}, GiB a device", a, b, 2))
    columns = ["", *names, "B / A"]
    tables = [Table(columns, rows, title=f"A: {_title(first)}; B: {_title(second)}")]
    seconds = [
        {(row["part"], row["phase"]): row["seconds"] * 1e3 for row in plan["parts"]}
        for plan in (first, second)
    ]
    keys = list(dict.fromkeys([*seconds[0], *seconds[1]]))
    parts = [
        _compared(" ".join(key), seconds[0].get(key, 0.0), seconds[1].get(key, 0.0), 1)
        for key in keys
    ]
    if parts:
        tables.append(Table(columns, parts, title="Computation by part, ms a step"))
    return tables


def _compared(label: str, a: float, b: float, digits: int) -> list[Any]:
    return [label, f"{a:,.{digits}f}", f"{b:,.{digits}f}", b / a if a else math.nan]


def report(plan: dict[str, Any]) -> Report:
    """The plan as a page."""
    b = plan["per_device_bytes"]
    numbers = [(f"{b['total'] / GIB:.1f} GiB", f"of {plan['hbm_bytes'] / GIB:.1f} a device")]
    if plan["mfu"] is not None:
        numbers += [
            (f"{plan['step_seconds']:.2f} s", "a step"),
            (f"{plan['mfu']:.1%}", f"MFU; {_error(plan)}"),
            (duration(plan["days"]), f"for {plan['tokens']:.3g} tokens"),
            (f"${plan['price']:,.0f}", f"at ${plan['price_per_chip_hour']:.2f} a chip-hour"),
        ]
    sections = [
        Section("Answer", [KeyNumbers(numbers), Text(plan["verdict"]), TableBlock(summary(plan))]),
        Section("Memory", [_memory_figure(plan)]),
    ]
    if plan["mfu"] is not None:
        sections += [
            Section("Time", [_time_figure(plan), TableBlock(part_table(plan))]),
            Section("Links", [TableBlock(collective_table(plan))]),
        ]
    mesh = f"Mesh: {_mesh(plan)}; {plan['mesh_reason']}."
    return Report(f"Plan: {plan['model']}", _title(plan), sections, footer=mesh)


def _memory_figure(plan: dict[str, Any]) -> Figure:
    b = plan["per_device_bytes"]
    parts = ["parameters", "optimizer", "activations", "temporaries"]
    with figures.style():
        figure, (axes,) = figures.panels(1, 1, height=1.5)
        _stack(axes, [(part, b[part] / GIB) for part in parts], "GiB a device")
        axes.axvline(plan["hbm_bytes"] / GIB, color=figures.INK, linestyle="--", linewidth=1)
    text = ", ".join(f"{part} {b[part] / GIB:.2f} GiB" for part in parts)
    caption = "Memory of one device; the dashed line is what a program may use."
    return Figure(figure, caption, text)


def _time_figure(plan: dict[str, Any]) -> Figure:
    totals: dict[str, float] = {}
    for row in plan["parts"]:
        totals[row["part"]] = totals.get(row["part"], 0.0) + row["seconds"] * 1e3
    totals["waiting for links"] = plan["exposed_collective_seconds"] * 1e3
    shown = [(part, value) for part, value in totals.items() if value > 0]
    with figures.style():
        figure, (axes,) = figures.panels(1, 1, height=1.5)
        _stack(axes, shown, "ms a step")
    text = ", ".join(f"{part} {value:.1f} ms" for part, value in shown)
    return Figure(figure, "Time of one step by part of the model, all passes.", text)


def _stack(axes, parts: Sequence[tuple[str, float]], label: str) -> None:
    left = 0.0
    for i, (name, value) in enumerate(parts):
        color = figures.PALETTE[i % len(figures.PALETTE)]
        hatch = "//" if i >= len(figures.PALETTE) else None
        axes.barh(0, value, left=left, color=color, label=name, height=0.6, hatch=hatch)
        left += value
    axes.set_yticks([])
    axes.set_xlabel(label)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5)
