"""Ranking meshes without compiling, by a coarse model of memory and links.

The model only has to put meshes about in order: `trial` compiles the first few.
"""

import dataclasses
import math
from collections.abc import Iterator

from kernels_pallas.grouped_matmul import words
from olmax.errors import UserError
from olmax.models.config import DecoderConfig
from olmax.planning.roofline import RETILED_BYTES_PER_CYCLE
from olmax.planning.topology import Topology
from olmax.sharding import MeshConfig

# Share of the peak that matrix products reach, for the balance of computation and links.
_ATTAINABLE = 0.7

# What every further piece of a product's width under tensor parallelism costs on top.
_NARROWER = 0.08

# Bytes a device moves in a step for every parameter it holds (casts, gradients, the optimiser), and
# the share of the HBM bandwidth that it does so with. After OLMo 2 1B planned for v5p:2x2x4,
# 64 x 4,096: fsdp=16 0.55 s, data=4,fsdp=4 0.59 s, data=16 0.62 s.
_STATE_BYTES = 75
_MEMORY_SHARE = 0.35

# Rows of a register: pieces of weights with a number of columns that these do not divide are
# gathered in tiles of fewer rows, from which one matrix a layer is copied, slowly, before its
# products in the forward pass and its recomputation. After OLMo 2 32B on v6e:16x16, fsdp=256.
_REGISTER_ROWS = 8

# How often a layer's rows (one for every expert of a token), and its buffers for rows from other
# devices, are read and written in a step, and how many such buffers there are at once. Rows that
# travel as words (`models/expert_words.py`) spare the buffers' copies between layouts. After
# OLMoE-1B-7B planned for v5p:2x2x4, 16 x 4,096: fsdp=16 0.36 s and 4.0 GiB of temporaries,
# fsdp=2,expert=8 0.30 s and 9.5 GiB (0.47 s not as words), expert=16 0.29 s and 10.9 GiB.
_ROW_PASSES = 28
_BUFFER_PASSES = 12
_BUFFER_PASSES_OF_WORDS = 1
_BUFFERS = 7


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A possible mesh with its estimates."""

    mesh: MeshConfig
    compute_seconds: float
    link_seconds: float
    bytes: int

    @property
    def seconds(self) -> float:
        """Of one step, nothing overlapped."""
        return self.compute_seconds + self.link_seconds


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The meshes to take, the best by estimate first, and why that one is."""

    meshes: tuple[MeshConfig, ...]
    reason: str

    @property
    def mesh(self) -> MeshConfig:
        return self.meshes[0]


def propose(
    config: DecoderConfig,
    topology: Topology,
    batch_size: int,
    sequence_length: int,
    *,
    accumulation: int = 1,
) -> Proposal:
    """Those that fit by estimate, the quickest first; the one with the least memory if none does.

    Raises:
      UserError: no mesh divides the batch and the model.
    """
    found = list(candidates(config, topology, batch_size, sequence_length, accumulation))
    if not found:
        raise UserError(
            f"no mesh of {topology.num_chips} chips divides batch size {batch_size}"
            + (f" in {accumulation} micro-batches" if accumulation > 1 else "")
            + f" and the model (n_kv_heads={config.n_kv_heads}, d_model={config.d_model}); "
            f"take a batch size that is a multiple of {topology.num_chips * accumulation}"
        )
    limit = 0.92 * topology.chip.hbm_bytes
    fitting = [candidate for candidate in found if candidate.bytes <= limit]
    if not fitting:
        best = min(found, key=lambda c: (c.bytes, c.seconds))
        reason = (
            f"none of {len(found)} possible meshes fits by estimate; this one needs the least "
            f"({best.bytes / 2**30:.1f} GiB a device)"
        )
        return Proposal((best.mesh,), reason)
    ordered = sorted(fitting, key=lambda c: (c.seconds, c.bytes))
    best = ordered[0]
    reason = (
        f"least estimated step of {len(fitting)} meshes that fit: {best.compute_seconds:.2f} s of "
        f"computation and {best.link_seconds:.2f} s on the links"
    )
    if len(ordered) > 1:
        other = ordered[1]
        reason += (
            f"; next {text_of(other.mesh)} with {other.compute_seconds:.2f} and "
            f"{other.link_seconds:.2f} s"
        )
    return Proposal(tuple(candidate.mesh for candidate in ordered), reason)


def text_of(mesh: MeshConfig) -> str:
    """As on a command line, `fsdp=32,tensor=2`."""
    sizes = dataclasses.asdict(mesh)
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "fsdp=1"


def candidates(
    config: DecoderConfig,
    topology: Topology,
    batch_size: int,
    sequence_length: int,
    accumulation: int = 1,
) -> Iterator[Candidate]:
    """All ways to put the chips along data, fsdp, expert and tensor that divide batch and model."""
    chips = topology.num_chips * topology.chip.devices_per_chip // topology.slices
    experts = 1 if config.moe is None else config.moe.n_experts
    for tensor in _divisors(chips):
        if config.n_kv_heads % tensor or config.d_ff % tensor or config.vocab_size % tensor:
            continue
        for expert in _divisors(math.gcd(chips // tensor, experts)):
            for fsdp in _divisors(chips // tensor // expert):
                data = chips // tensor // expert // fsdp
                shards = topology.slices * data * fsdp * expert
                if config.d_model % fsdp or batch_size % (shards * accumulation):
                    continue
                mesh = MeshConfig(topology.slices, data, fsdp, expert, tensor)
                tokens = batch_size * sequence_length / shards
                yield _estimate(config, topology, mesh, tokens, sequence_length, accumulation)


def _estimate(
    config: DecoderConfig,
    topology: Topology,
    mesh: MeshConfig,
    tokens: float,
    sequence_length: int,
    accumulation: int,
) -> Candidate:
    """`tokens` are those of one batch shard (all devices of its tensor group work on them)."""
    chip = topology.chip
    chips = mesh.data * mesh.fsdp * mesh.expert * mesh.tensor
    in_experts = 0
    if config.moe is not None:
        in_experts = config.n_layers * config.moe.n_experts * 3 * config.d_model * config.d_ff
    # What one expert group of devices has to do with.
    params = config.num_params - in_experts + in_experts / mesh.expert
    held = params / (mesh.fsdp * mesh.tensor)

    def bandwidth(axis: int, *, whole: bool = True) -> float:
        # An axis has the links of the dimensions of the torus that it needs, or its share of them.
        dimensions = chip.dimensions * math.log(axis) / math.log(chips)
        spanned = math.ceil(dimensions - 1e-9) if whole else max(dimensions, 1)
        return 2 * chip.link_bandwidth * spanned

    flops = config.matmul_flops_per_token(sequence_length) * 4 / 3
    compute = flops * tokens / mesh.tensor / chip.peak_flops / _ATTAINABLE
    compute *= 1 + _NARROWER * (mesh.tensor - 1)
    compute += _STATE_BYTES * held / chip.hbm_bandwidth / _MEMORY_SHARE
    if mesh.fsdp > 1 and config.d_model // mesh.fsdp % _REGISTER_ROWS:
        copied = 2 * 2 * config.d_model * config.d_ff / mesh.tensor
        cycles = config.n_layers * 2 * copied / RETILED_BYTES_PER_CYCLE
        compute += accumulation * cycles / chip.clock_hz
    # Weights are gathered for the forward pass and for its recomputation, gradients are reduced.
    links = 0.0
    if mesh.fsdp > 1:
        # Twice in bfloat16; the sum of float32 gradients goes around the ring twice.
        links += (2 * 2 + 2 * 4) * params / mesh.tensor * accumulation / bandwidth(mesh.fsdp)
    if mesh.data > 1:
        links += 2 * 4 * held / bandwidth(mesh.data)
    if mesh.slices > 1:
        links += 2 * 4 * held / chip.dcn_bandwidth
    buffer = 0.0
    if config.moe is not None:
        # Tensor parallelism does not cut them.
        rows = 2 * tokens * config.d_model * config.moe.experts_per_token
        compute += config.n_layers * _ROW_PASSES * 2 * rows / chip.hbm_bandwidth
    if mesh.expert > 1 and config.moe is not None:
        # Room for the worst case: all tokens of a group go to the experts of one device.
        copies = min(config.moe.experts_per_token * mesh.expert, config.moe.n_experts)
        buffer = 2 * tokens * config.d_model * copies
        as_words = words.suits("bfloat16", config.d_model, config.d_ff // mesh.tensor)
        passes = _BUFFER_PASSES_OF_WORDS if as_words else _BUFFER_PASSES
        compute += config.n_layers * passes * 2 * buffer / chip.hbm_bandwidth
        # Parameters outside the experts are the same in all groups, so gradients are summed.
        links += 2 * 4 * (held - in_experts / mesh.expert / mesh.fsdp) / bandwidth(mesh.expert)
        # Tokens go to their experts and back, in the forward pass, its recomputation and backward.
        sent = 2 * tokens * config.d_model * config.moe.experts_per_token
        links += config.n_layers * 6 * sent * (1 - 1 / mesh.expert) / bandwidth(mesh.expert)
    if mesh.tensor > 1:
        # Two sums of the activations a layer, in the forward pass, its recomputation and backward.
        activation = 2 * tokens * config.d_model
        links += config.n_layers * 6 * 2 * activation / bandwidth(mesh.tensor, whole=False)
    micro = tokens / accumulation
    # A layer's experts are all gathered, although a token meets a few of them.
    layer_d_ff = config.d_ff * (config.moe.n_experts / mesh.expert if config.moe else 1)
    widest = max(2 * config.active_d_ff, config.d_model + 2 * config.n_kv_heads * config.head_dim)
    memory = (
        12 * held
        + 4 * held
        + 2 * micro * config.d_model * config.n_layers
        + 3 * 2 * micro * widest / mesh.tensor
        + 3 * 2 * config.d_model * layer_d_ff * 3 / mesh.tensor
        + 6 * config.vocab_size * config.d_model / mesh.tensor
        + 2 * 4 * min(micro, 1024) * config.vocab_size / mesh.tensor
        + _BUFFERS * buffer / accumulation
    )
    return Candidate(mesh, compute, links, int(memory))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
