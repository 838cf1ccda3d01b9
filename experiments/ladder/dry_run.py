"""What a ladder would take: every run's settings, compute, and time on TPUs, without training."""

import dataclasses
from collections.abc import Mapping, Sequence

from rich.console import Console

from experiments.ladder.presets import Ladder
from experiments.ladder.recipe import Rung
from olmax.reporting.tables import Column, Table

ROWS_PER_DEVICE = 4
"""Sequences of 4,096 tokens that a device takes at a time; the rest of a batch is accumulated."""


@dataclasses.dataclass(frozen=True)
class SizePlan:
    """What `olmax plan` says of one size: its runs differ in length alone."""

    step_seconds: float | None
    """None: does not fit."""
    mfu: float | None
    chips: int
    dollars_per_hour: float
    """Of the whole slice."""
    verdict: str

    def hours(self, rung: Rung) -> float | None:
        """Of a run."""
        return None if self.step_seconds is None else rung.steps * self.step_seconds / 3600

    def price(self, rung: Rung) -> float | None:
        """US dollars of a run."""
        hours = self.hours(rung)
        return None if hours is None else hours * self.dollars_per_hour


def plan_sizes(
    ladder: Ladder, rungs: Sequence[Rung], console: Console | None = None
) -> dict[str, SizePlan]:
    """Compiles one step of every size for the ladder's topology.

    Args:
      ladder: with a topology.
      rungs: its runs.
      console: where progress is printed.

    Raises:
      UserError: libtpu is missing, or a batch does not fit the topology.
    """
    from olmax.planning.plan import plan
    from olmax.planning.topology import Topology

    topology = Topology.parse(ladder.topology)
    devices = len(topology.devices())
    found = {}
    for rung in rungs:
        if rung.size in found:
            continue
        if console is not None:
            console.print(f"planning {rung.size} on {ladder.topology}", style="dim")
        rows = devices * ROWS_PER_DEVICE * max(1, 4096 // rung.shape.seq_len)
        # Whole micro-batches: the fewest that are small enough.
        accumulation = next(
            parts
            for parts in range(max(1, rung.batch_size // rows), rung.batch_size + 1)
            if rung.batch_size % parts == 0
        )
        result = plan(
            rung.model(),
            topology,
            batch_size=rung.batch_size,
            sequence_length=rung.shape.seq_len,
            accumulation=accumulation,
            tokens=rung.tokens,
        )
        found[rung.size] = SizePlan(
            result.step_seconds,
            result.mfu,
            result.chips,
            result.chips * result.price_per_chip_hour,
            result.verdict,
        )
    return found


def ladder_table(
    rungs: Sequence[Rung], target: Rung | None = None, plans: Mapping[str, SizePlan] | None = None
) -> Table:
    """What would be trained, run by run, the target last.

    Args:
      rungs: the runs that are fitted.
      target: what they predict.
      plans: by size, for hours and dollars.
    """
    columns = [
        Column("run", align="left"),
        "N",
        "batch",
        Column("peak LR", align="right"),
        "warm-up",
        "steps",
        "tokens",
        "FLOPs/token",
        Column("FLOPs", align="right"),
    ]
    if plans:
        columns += [Column("MFU %", digits=0), Column("hours", digits=1), Column("$", digits=0)]
    everything = [*rungs, target] if target is not None else list(rungs)
    rows = []
    for r in everything:
        row: list = [
            r.name,
            r.shape.parameters,
            r.batch_size,
            f"{r.learning_rate:.4e}",
            r.warmup_steps,
            r.steps,
            r.tokens,
            r.shape.flops_per_token,
            f"{r.flops:.3e}",
        ]
        if plans:
            of = plans[r.size]
            row += [None if of.mfu is None else 100 * of.mfu, of.hours(r), of.price(r)]
        rows.append(row)
    return Table(
        columns,
        rows,
        title="Ladder",
        caption=_totals(rungs, target, plans),
        strong_rows=[len(rows) - 1] if target is not None else [],
    )


def _totals(
    rungs: Sequence[Rung], target: Rung | None, plans: Mapping[str, SizePlan] | None
) -> str:
    total = sum(r.flops for r in rungs)
    simple = sum(6.0 * r.shape.parameters * r.tokens for r in rungs)
    text = (
        f"The {len(rungs)} runs of the ladder: {total:.3e} FLOPs as counted per token, "
        f"{simple:.3e} as 6ND."
    )
    if target is not None:
        share = simple / (6.0 * target.shape.parameters * target.tokens)
        text += f" That is {100 * share:.1f}% of {target.name} (6ND)."
    if plans:
        hours = [plans[r.size].hours(r) for r in rungs]
        prices = [plans[r.size].price(r) for r in rungs]
        known = [h for h in hours if h is not None]
        text += (
            f" Planned {sum(known):,.1f} hours and "
            f"${sum(p for p in prices if p is not None):,.0f} at list price"
        )
        text += "." if len(known) == len(hours) else "; some runs do not fit and are left out."
    return text


def print_plan(ladder: Ladder, console: Console) -> None:
    """Prints the ladder; plans it where it names a topology.

    Raises:
      UserError: see `plan_sizes` and `Ladder.check`.
    """
    ladder.check()
    rungs, target = ladder.rungs(), ladder.target_rung()
    plans = plan_sizes(ladder, [*rungs, target], console) if ladder.topology else None
    console.print(ladder_table(rungs, target, plans).rich())
    if plans is None:
        console.print("No TPU time: give --ladder.topology, such as v5p:2x2x4.", highlight=False)
        return
    for size, of in plans.items():
        if of.step_seconds is None:
            console.print(f"{size}: {of.verdict}", highlight=False, soft_wrap=True)
    chips = next(iter(plans.values())).chips
    console.print(
        f"Hours: compiled for {ladder.topology} ({chips} chips), step time as `olmax plan` gives "
        "it; evaluations, checkpoints and restarts are not in it.",
        highlight=False,
        soft_wrap=True,
    )
