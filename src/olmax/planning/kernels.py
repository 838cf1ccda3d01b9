"""Time of Pallas kernels: the compiler has no estimate for them.

`KERNELS` is the table; the first entry whose pattern stands at the beginning of a word of the
call's name counts (jax puts `jvp_` and `transpose_jvp_` before it). Attention and the compiler's
ragged-dot have measured figures. Every other kernel is timed by the work it declares
(`pl.CostEstimate`, which the compiled program keeps): the longer of its FLOPs over an attainable
share of the peak and its bytes over the HBM bandwidth. A kernel that declares nothing has no time.
"""

import dataclasses
import math
import re
from collections.abc import Callable

from olmax.planning import program
from olmax.planning.chips import Chip

# Shares of the backward tile time, after the lengths of the kernels' instruction schedules
# (2,561 : 2,048 bundles on v5p, the same ratio within 2% on v5e and v6e).
_DKV_SHARE = 0.556

_TILE = 512

# Share of the peak that the compiler's ragged-dot reaches, forward and backward together: 98
# TFLOP/s measured on v5p for 32,768 tokens, widths 2048 and 1408, 60 experts of which 4 are active
# (marin-community/marin#2704). Taken for all chips and shapes.
_RAGGED_DOT_ATTAINS = 98 / 459

_DECLARED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"[^}]*"bytes_accessed":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Kernels that are timed alike."""

    pattern: str
    """Regular expression for the kernel's name."""
    part: str
    """Of the model, as in `cost.PARTS`."""
    seconds: Callable[[program.Instruction, int, Chip], float | None]
    """Time of a call, from it, its operands' bytes and the chip; None: not known."""


def seconds(call: program.Instruction, operand_bytes: int, chip: Chip) -> float | None:
    """Time of one call on one device; None for a kernel of which nothing is known."""
    return find(call).seconds(call, operand_bytes, chip)


def find(call: program.Instruction) -> Kernel:
    """The table's entry for a call."""
    return next(kernel for kernel in KERNELS if _named(kernel.pattern, call))


def _named(pattern: str, call: program.Instruction) -> re.Match[str] | None:
    return re.search(rf"(?:^|_)(?:{pattern})", call.name)


def _declared(
    share: float, **of_chips: float
) -> Callable[[program.Instruction, int, Chip], float | None]:
    """Time by the declared work, where products attain `share` of the peak; chips named apart have
    their own.
    """

    def time(call: program.Instruction, operand_bytes: int, chip: Chip) -> float | None:
        del operand_bytes
        found = _DECLARED.search(call.text)
        if not found:
            return None
        peak = of_chips.get(chip.name, share) * chip.peak_flops
        return max(int(found[1]) / peak, int(found[2]) / chip.hbm_bandwidth)

    return time


def _splash(call: program.Instruction, operand_bytes: int, chip: Chip) -> float:
    """jax's causal attention: tiles on or below the diagonal times the fitted time of a tile, plus
    its operands' and results' way through HBM.
    """
    match = _named(_SPLASH, call)
    assert match is not None
    shapes = [shape for dtype, shape in program.array_shapes(call.type) if len(shape) >= 3]
    *lead, length, width = shapes[0]
    rate = chip.splash.tile_seconds
    if match[1] == "dkv":
        # The first result is dk, whose heads are the key heads; tiles go by query heads.
        rate *= chip.splash.backward * _DKV_SHARE
    elif match[1] == "dq":
        rate *= chip.splash.backward * (1 - _DKV_SHARE)
    side = length / _TILE
    tiles = math.prod(lead) * side * (side + 1) / 2 * (width / 128)
    traffic = (operand_bytes + program.array_bytes(call.type)) / chip.hbm_bandwidth
    return tiles * rate + traffic


def _attention(call: program.Instruction, operand_bytes: int, chip: Chip) -> float | None:
    """Our attention: the tiles that its declared products make, at splash's time of a tile.

    Ours has not been measured; splash's figures are an upper bound by the schedules (0.5 to 0.7 of
    the bundles on v6e, kernels_pallas/BENCHMARK.md).
    """
    match, declared = _named(_ATTENTION, call), _DECLARED.search(call.text)
    if match is None or declared is None:
        return None
    products, relative = (4, 1.0) if match[1] == "forward" else (10, chip.splash.backward)
    tiles = int(declared[1]) / (products * _TILE * _TILE * 128)
    traffic = (operand_bytes + program.array_bytes(call.type)) / chip.hbm_bandwidth
    return tiles * relative * chip.splash.tile_seconds + traffic


def _ragged_dot(call: program.Instruction, operand_bytes: int, chip: Chip) -> float:
    """The products of sorted rows [M, K] with the matrix of their group, or their gradients.

    The larger of the products' time and of operands' and results' way through HBM. Rows of a tile
    that belong to another group are not counted.
    """
    traffic = (operand_bytes + program.array_bytes(call.type)) / chip.hbm_bandwidth
    stated = program.array_shapes(call.attribute("operand_layout_constraints") or "")
    floats = [shape for dtype, shape in stated if len(shape) >= 2 and dtype[0] in "bf"]
    if call.name.startswith("ragged-dot-metadata") or len(floats) < 2:
        return traffic
    result = next(shape for _, shape in program.array_shapes(call.type) if len(shape) >= 2)
    # Rows by rows' width by the other width; a gradient of matrices has the latter in its second
    # operand.
    other = result[-1] if len(result) == 2 else floats[1][-1]
    flops = 2 * math.prod(floats[0]) * other
    return max(traffic, flops / (_RAGGED_DOT_ATTAINS * chip.peak_flops))


_SPLASH = r"splash_m[hq]a_(fwd|dq|dkv)"
_ATTENTION = r"attention_(forward|backward)"

KERNELS = (
    Kernel(_SPLASH, "attention kernel", _splash),
    Kernel(_ATTENTION, "attention kernel", _attention),
    Kernel("ragged-dot", "experts", _ragged_dot),
    # By its schedules (kernels_pallas/linear_cross_entropy/README.md) 1.0 of the peak, on v6e 0.77;
    # a tenth less for what a schedule does not show.
    Kernel("linear_cross_entropy_", "head and loss", _declared(0.9, v6e=0.7)),
    # Likewise 1.0, on v6e 0.91 (kernels_pallas/grouped_matmul/README.md). Declared is the work of
    # whole tiles, which with many small groups is more than that of their rows.
    Kernel("grouped_", "experts", _declared(0.9, v6e=0.8)),
    # Both are bound by HBM.
    Kernel("route|combine", "router", _declared(0.4)),
    # Whatever nobody has looked at yet.
    Kernel("", "other", _declared(0.4)),
)
