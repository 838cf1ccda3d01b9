"""A plan: what a training run needs, read out of its compiled step."""

import contextlib
import dataclasses
import time
from typing import Any

from jax.sharding import Mesh

from kernels_pallas import targets
from olmax import sharding
from olmax.errors import UserError
from olmax.models.config import DecoderConfig, Execution
from olmax.models.presets import get_preset
from olmax.planning import advice, calibration, compilation, cost, memory, trial
from olmax.planning.topology import Topology
from olmax.training.step import TrainStep

DEFAULT_TOKENS = 1e12


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """Bytes of one device; the parts add up to `total`."""

    parameters: int
    optimizer: int
    activations: int
    """Saved by the forward pass for the backward pass."""
    temporaries: int
    """The rest: gradients, gathered weights, workspace, the batch, padding, code."""
    total: int


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind along the same mesh axes, one device, one step."""

    kind: str
    axes: tuple[str, ...]
    calls: int
    bytes: int
    seconds: float
    """On the links, alone."""
    overlapped_seconds: float
    """Of these, beside computation."""


@dataclasses.dataclass(frozen=True)
class PartTotal:
    """One part of the model in one pass."""

    part: str
    phase: str
    cycles: int
    seconds: float
    flops_share: float | None
    """Of the peak while it runs, for the parts whose FLOPs are counted."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found. Times and prices are None for a program that does not fit."""

    model: str
    parameters: int
    topology: str
    slices: int
    devices: int
    chips: int
    mesh: dict[str, int]
    mesh_reason: str
    batch_size: int
    sequence_length: int
    accumulation: int
    remat: str
    per_device_bytes: DeviceBytes
    hbm_bytes: int
    fits: bool
    verdict: str
    step_seconds: float | None
    compute_seconds: float | None
    kernel_seconds: float | None
    exposed_collective_seconds: float | None
    cycles: int | None
    mfu: float | None
    mfu_error: float | None
    """Relative; None before any calibration (see `olmax.planning.calibration`)."""
    tokens_per_second_per_chip: float | None
    collectives: tuple[CollectiveTotal, ...]
    parts: tuple[PartTotal, ...]
    tokens: float
    days: float | None
    price_per_chip_hour: float
    price: float | None
    compile_seconds: float
    plan_seconds: float
    quick: bool = False
    """Whether the times are estimated from FLOPs and bytes, not by the compiler."""
    machine_code: bool = True
    """Whether the compiler made all of it, so that its size is known."""


def plan(
    model: str | DecoderConfig,
    topology: Topology,
    *,
    batch_size: int,
    sequence_length: int,
    mesh: str | None = None,
    remat: str = "full",
    accumulation: int = 1,
    tokens: float = DEFAULT_TOKENS,
    price_per_chip_hour: float | None = None,
    keep_program: str | None = None,
    quick: bool = False,
    machine_code: bool = False,
) -> Plan:
    """Compiles one training step for `topology` and reads the plan out of it.

    Args:
      model: a preset's name or a configuration.
      topology: TPU slices.
      batch_size: sequences of one update.
      sequence_length: tokens of a sequence.
      mesh: such as `fsdp=32,tensor=2`; when None, the quickest of those that `trial` compiles.
      remat: see `Execution.remat`.
      accumulation: micro-batches.
      tokens: length of the run.
      price_per_chip_hour: US dollars; the list price when None.
      keep_program: file to write the compiled program's text to.
      quick: stop the compiler before machine code. Memory and collectives are its own; the time of
        an operation is estimated from its FLOPs and bytes.
      machine_code: wait for all machine code, several times as long; otherwise that of kernels is
        enough, and the estimated cycles of everything else.

    Raises:
      UserError: the input does not fit together, or libtpu is missing.
    """
    request: dict[str, Any] = dict(
        model=model,
        topology=topology,
        batch_size=batch_size,
        sequence_length=sequence_length,
        mesh=mesh,
        remat=remat,
        accumulation=accumulation,
        tokens=tokens,
        price_per_chip_hour=price_per_chip_hour,
        keep_program=keep_program,
        machine_code=machine_code,
    )
    with contextlib.closing(trial.stages(request)) as stages:
        made = next(stages)
        if not quick:
            for made in stages:  # noqa: B007
                pass
        return made


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What is planned, before it is compiled."""

    start: float
    name: str
    config: DecoderConfig
    topology: Topology
    mesh: Mesh
    mesh_reason: str
    step: TrainStep
    batch_size: int
    sequence_length: int
    accumulation: int
    remat: str
    tokens: float
    price_per_chip_hour: float
    keep_program: str | None
    machine_code: bool


def prepare(
    model: str | DecoderConfig,
    topology: Topology,
    *,
    batch_size: int,
    sequence_length: int,
    mesh: str,
    remat: str,
    accumulation: int,
    tokens: float,
    price_per_chip_hour: float | None,
    keep_program: str | None,
    machine_code: bool = False,
    mesh_reason: str = "given",
) -> Prepared:
    """Checks what `plan` is asked, and builds the step.

    Raises:
      UserError: the input does not fit together, or libtpu is missing.
    """
    start = time.monotonic()
    name = model if isinstance(model, str) else "custom"
    config = get_preset(model) if isinstance(model, str) else model
    compilation.check_sizes(batch_size, sequence_length, accumulation)
    if tokens <= 0:
        raise UserError(f"tokens must be positive, is {tokens:g}")
    if price_per_chip_hour is not None and not price_per_chip_hour >= 0:
        raise UserError(f"price per chip-hour must be 0 or more, is {price_per_chip_hour:g}")
    chip = topology.chip
    devices = topology.devices()
    mesh_config = sharding.MeshConfig.parse(mesh)
    if topology.slices > 1 and mesh_config.slices == 1:
        mesh_config = dataclasses.replace(mesh_config, slices=topology.slices)
    on = sharding.make_mesh(mesh_config, devices)
    compilation.check(config, on, batch_size, sequence_length, accumulation)
    # As the trainer on TPUs: every implementation is its own choice.
    execution = Execution(
        compute_dtype="bfloat16",
        remat=remat,  # pyright: ignore[reportArgumentType]
    )
    tokens_per_step = batch_size * sequence_length
    with targets.compiling_for("tpu"):
        step = compilation.build(
            config, execution, on, tokens_per_step=tokens_per_step, accumulation=accumulation
        )
    hourly = chip.price_per_chip_hour if price_per_chip_hour is None else price_per_chip_hour
    return Prepared(
        start=start,
        name=name,
        config=config,
        topology=topology,
        mesh=on,
        mesh_reason=mesh_reason,
        step=step,
        batch_size=batch_size,
        sequence_length=sequence_length,
        accumulation=accumulation,
        remat=remat,
        tokens=tokens,
        price_per_chip_hour=hourly,
        keep_program=keep_program,
        machine_code=machine_code,
    )


def answer(prepared: Prepared, compiled: compilation.CompiledStep) -> Plan:
    """The plan of a step, whole or quick by what the compiler gave.

    Raises:
      UserError: the program holds something that has no price.
    """
    config, topology, on = prepared.config, prepared.topology, prepared.mesh
    chip, step, batch_size = topology.chip, prepared.step, prepared.batch_size
    tokens_per_step = batch_size * prepared.sequence_length
    quick = bool(compiled.text) and not compiled.timed
    if prepared.keep_program and compiled.text:
        from olmax.reporting.files import write_text

        write_text(prepared.keep_program, compiled.text)

    parameters = compilation.device_bytes(step.abstract_state.params)
    optimizer = compilation.device_bytes(step.abstract_state.opt_state)
    activations = memory.saved_activations(compiled.text, config.n_layers) if compiled.text else 0
    rest = max(0, compiled.total_bytes - parameters - optimizer - activations)
    per_device = DeviceBytes(
        parameters, optimizer, activations, rest, parameters + optimizer + activations + rest
    )
    fits = compiled.refused is None and per_device.total <= chip.hbm_bytes
    verdict = advice.verdict(
        per_device.total,
        parameters + optimizer,
        fits=fits,
        topology=topology,
        accumulation=prepared.accumulation,
        batch_per_shard=batch_size // sharding.batch_shards(on) // prepared.accumulation,
    )
    fields: dict[str, Any] = dict.fromkeys(
        [
            "step_seconds",
            "compute_seconds",
            "kernel_seconds",
            "exposed_collective_seconds",
            "cycles",
            "mfu",
            "tokens_per_second_per_chip",
            "days",
            "price",
        ]
    )
    fields |= dict(collectives=(), parts=())
    if compiled.text:
        items = step_costs(compiled.text, on, topology, estimate=quick)
        seconds = cost.total_seconds(items)
        flops = config.matmul_flops_per_token(prepared.sequence_length) * tokens_per_step
        days = prepared.tokens / tokens_per_step * seconds / 86400
        fields |= dict(
            step_seconds=seconds,
            compute_seconds=sum(c.times * c.seconds for c in items if c.source != "kernel"),
            kernel_seconds=sum(c.times * c.seconds for c in items if c.source == "kernel"),
            exposed_collective_seconds=cost.exposed_seconds(items),
            cycles=sum(c.times * c.cycles for c in items),
            mfu=flops / seconds / (on.size * chip.peak_flops),
            tokens_per_second_per_chip=tokens_per_step / seconds / topology.num_chips,
            collectives=collective_totals(items),
            parts=part_totals(items, config, tokens_per_step / on.size, chip.peak_flops),
            days=days,
            price=days * 24 * topology.num_chips * prepared.price_per_chip_hour,
        )
    return Plan(
        model=prepared.name,
        parameters=config.num_params,
        topology=topology.name,
        slices=topology.slices,
        devices=on.size,
        chips=topology.num_chips,
        mesh={axis: size for axis, size in on.shape.items() if size > 1},
        mesh_reason=prepared.mesh_reason,
        batch_size=batch_size,
        sequence_length=prepared.sequence_length,
        accumulation=prepared.accumulation,
        remat=prepared.remat,
        per_device_bytes=per_device,
        hbm_bytes=chip.hbm_bytes,
        fits=fits,
        verdict=verdict,
        mfu_error=calibration.relative_error(quick=quick),
        tokens=prepared.tokens,
        price_per_chip_hour=prepared.price_per_chip_hour,
        compile_seconds=compiled.compile_seconds,
        plan_seconds=time.monotonic() - prepared.start,
        quick=quick,
        machine_code=compiled.machine_code,
        **fields,
    )


def step_costs(text: str, mesh, topology: Topology, *, estimate: bool = False) -> list[cost.Cost]:
    """`cost.costs`, with what cannot be priced as a user's error."""
    try:
        return cost.costs(text, mesh, topology.chip, estimate=estimate)
    except cost.UnknownKernel as error:
        raise UserError(
            f"the plan has no time for the kernel {error}; its figures belong in "
            "olmax/planning/kernels.py"
        ) from error
    except ValueError as error:
        raise compilation.MeshError(
            f"the step compiles for this mesh, but its time cannot be read: {error}; "
            "try another mesh"
        ) from error


def collective_totals(items: list[cost.Cost]) -> tuple[CollectiveTotal, ...]:
    """Collectives by kind and mesh axes, the slowest first."""
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for item in items:
        found = item.collective
        if found is None or found.group < 2:
            continue
        row = totals.setdefault((found.kind, found.axes), [0, 0, 0.0, 0.0])
        row[0] += item.times
        row[1] += item.times * found.bytes
        row[2] += item.times * found.seconds
        row[3] += item.times * found.seconds if item.overlapped else 0
    rows = [
        CollectiveTotal(kind, axes, int(calls), int(size), seconds, overlapped)
        for (kind, axes), (calls, size, seconds, overlapped) in totals.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def part_totals(
    items: list[cost.Cost], config: DecoderConfig, tokens: float, peak: float
) -> tuple[PartTotal, ...]:
    """Computation by part and pass, in the model's order; `tokens` are those of one device."""
    totals: dict[tuple[str, str], list[float]] = {}
    for item in items:
        row = totals.setdefault((item.part, item.phase), [0, 0.0])
        row[0] += item.times * item.cycles
        row[1] += item.times * item.seconds
    phases = ("forward", "recomputed", "backward", "update")
    forward = forward_flops(config)
    rows = []
    for part in cost.PARTS:
        for phase in phases:
            cycles, seconds = totals.get((part, phase), (0, 0.0))
            if seconds <= 0:
                continue
            share = None
            if part in forward and phase != "update":
                passes = 2 if phase == "backward" else 1
                share = passes * forward[part] * tokens / seconds / peak
            rows.append(PartTotal(part, phase, int(cycles), seconds, share))
    return tuple(rows)


def forward_flops(config: DecoderConfig) -> dict[str, int]:
    """FLOPs per token of the weight products of each part, forward."""
    attention = config.d_model * config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    dense = config.d_ff if config.moe is None else config.moe.shared_d_ff
    return {
        "attention projections": 2 * config.n_layers * attention,
        "MLP": 2 * config.n_layers * 3 * config.d_model * dense,
        "experts": 2 * config.n_layers * 3 * config.d_model * (config.active_d_ff - dense),
        "head and loss": 2 * config.d_model * config.vocab_size,
    }
