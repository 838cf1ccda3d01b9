"""`olmax plan`: what a training run on TPUs needs, without the TPUs."""

import contextlib
import dataclasses
from collections.abc import Generator
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, step time, MFU, days and price of training a model on TPU slices.

    The real train step is compiled for the slice on this machine's CPU (package libtpu, extra
    `tpu`) and the answers are read out of the compiled program. A quick plan is there in seconds,
    with estimated times; the whole one, with the compiler's own, takes a minute or two. Interrupted
    in between, the quick one is what is written.

    Examples: olmax plan --model olmo2-7b --topology v5p:4x4x4 --batch-size 64 --output plan.json
    ; olmax plan --compare a.json b.json
    """

    model: str | None = None
    """Name of an architecture, such as olmo2-32b."""
    topology: str | None = None
    """Chip and shape of a slice, such as v5p:8x8x8 or v6e:16x16."""
    batch_size: int | None = None
    """Sequences of one update, over all chips."""
    sequence_length: int = 4096
    """Tokens of a sequence."""
    mesh: str | None = None
    """Devices along the mesh axes, such as fsdp=32,tensor=2; when left out, the quickest of a few
    that are planned quickly."""
    slices: int = 1
    """Slices of this topology, joined by the data-centre network."""
    remat: Literal["none", "full", "dots", "projections"] = "full"
    """What the backward pass recomputes."""
    accumulation: int = 1
    """Micro-batches a batch is cut into."""
    tokens: float = 1e12
    """Length of the run, for days and price."""
    price_per_chip_hour: float | None = None
    """US dollars; the on-demand list price when left out."""
    ladder: str | None = None
    """Fit that `olmax ladder fit` wrote: predict task scores, and find the same scores for less."""
    quick: bool = False
    """Be content with the quick plan: the compiler's memory and collectives, times estimated from
    FLOPs and bytes."""
    machine_code: bool = False
    """Wait for the machine code of all operations, not of kernels alone: minutes, for the exact
    size of the code."""
    output: str | None = None
    """plan.json to write."""
    html: str | None = None
    """Page with the memory and the time to write."""
    explain: bool = False
    """List the step by part: cycles, time, share of the peak, and every collective."""
    program: str | None = None
    """File for the compiled program's text."""
    compare: tuple[str, str] | None = None
    """Two plan.json to set side by side; everything else is left out then."""

    def run(self) -> None:
        """Plans or compares, prints, writes the files asked for."""
        from rich.console import Console

        from olmax.errors import UserError

        console = Console(soft_wrap=True)
        if self.compare is not None:
            from olmax.planning.stored import load
            from olmax.planning.view import comparison

            for table in comparison(load(self.compare[0]), load(self.compare[1]), self.compare):
                console.print(table.rich())
            return
        if self.quick and self.machine_code:
            raise UserError("--quick stops before machine code; leave it or --machine-code out")
        missing = [
            f"--{name.replace('_', '-')}"
            for name in ("model", "topology", "batch_size")
            if getattr(self, name) is None
        ]
        if missing:
            raise UserError(f"a plan needs {', '.join(missing)} (or --compare A.json B.json)")
        assert self.model and self.topology and self.batch_size is not None
        saved = None
        if self.ladder is not None:
            # Read first: a plan takes a while.
            from olmax.scaling.saved import load as load_ladder

            saved = load_ladder(self.ladder)
        plans = make(
            self.model,
            self.topology,
            slices=self.slices,
            outputs=(self.output, self.html, self.program),
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            mesh=self.mesh,
            remat=self.remat,
            accumulation=self.accumulation,
            tokens=self.tokens,
            price_per_chip_hour=self.price_per_chip_hour,
            keep_program=self.program,
            machine_code=self.machine_code,
        )
        plan, interrupted = _last(
            plans,
            quick=self.quick,
            machine_code=self.machine_code,
            doing="compiling" if self.mesh else "comparing meshes",
        )
        from olmax.planning import view
        from olmax.reporting.files import write_json

        print(view.summary_text(plan))
        if self.mesh is None:
            print(f"mesh proposed: {plan['mesh_reason']}")
        if self.explain and plan["step_seconds"] is not None:
            console.print(view.part_table(plan).rich())
            console.print(view.collective_table(plan).rich())
        if saved is not None:
            from olmax.scaling.budget import add_outlook

            add_outlook(saved, plan, self.model, self.sequence_length, console)
        if self.output:
            write_json(self.output, plan)
        if self.html:
            view.report(plan).write(self.html)
        if interrupted:
            raise KeyboardInterrupt


def _last(
    plans: Generator[dict],
    *,
    quick: bool = False,
    machine_code: bool = False,
    doing: str = "compiling",
) -> tuple[dict, bool]:
    """The last of the plans that are asked for, and whether a better one was not waited for."""
    from rich.console import Console

    from olmax.planning import view

    better = [] if quick else ["the compiler's own times"]
    if machine_code:
        better.append("the machine code of everything")
    progress = Console(stderr=True, soft_wrap=True)
    with contextlib.closing(plans), progress.status(doing) as status:
        plan = next(plans)
        for what in better:
            ended = plan["machine_code"] or plan["step_seconds"] is None
            if ended:
                break
            progress.print(view.summary_text(plan), highlight=False, markup=False)
            progress.print(f"now {what}; ctrl-c keeps this plan")
            status.update(f"compiling, for {what}")
            try:
                plan = next(plans)
            except KeyboardInterrupt:
                return plan, True
        return plan, False


def make(model: str, topology: str, *, slices: int = 1, outputs=(), **settings) -> Generator[dict]:
    """Plans as plain JSON types, each better than the last (see `olmax.planning.trial.stages`);
    checks `outputs` first.

    Args:
      model: name of an architecture.
      topology: chip and shape of a slice.
      slices: of this topology.
      outputs: files that will be written.
      **settings: further arguments of `olmax.planning.plan.prepare`.

    Raises:
      UserError: bad input, or libtpu is missing.
    """
    from olmax.cli.output import check_output
    from olmax.planning.topology import Topology

    for path in outputs:
        if path:
            check_output(path)
    where = Topology.parse(topology, slices)
    from olmax.models.presets import get_preset

    get_preset(model)

    from olmax.planning.trial import stages
    from olmax.reporting.files import jsonable

    request = dict(model=model, topology=where, **settings)
    with contextlib.closing(stages(request)) as plans:
        yield from map(jsonable, plans)
