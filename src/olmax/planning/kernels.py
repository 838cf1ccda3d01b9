"""Time of Pallas kernels: the compiler has no estimate for them."""

import math
import re

from olmax.planning import program
from olmax.planning.chips import Chip

# Shares of the backward tile time, after the lengths of the kernels' instruction schedules
# (2,561 : 2,048 bundles on v5p, the same ratio within 2% on v5e and v6e).
_DKV_SHARE = 0.556

_TILE = 512


def seconds(call: program.Instruction, operand_bytes: int, chip: Chip) -> float | None:
    """Time of one call on one device; None for a kernel without figures.

    Splash attention with a causal mask: tiles on or below the diagonal times the fitted time of a
    tile, plus its operands' and results' way through HBM.
    """
    match = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", call.name)
    if not match:
        return None
    shapes = [shape for dtype, shape in program.array_shapes(call.type) if len(shape) >= 3]
    *lead, length, width = shapes[0]
    kind = match[1]
    rate = chip.splash.tile_seconds
    if kind == "dkv":
        # The first result is dk, whose heads are the key heads; tiles go by query heads.
        rate *= chip.splash.backward * _DKV_SHARE
    elif kind == "dq":
        rate *= chip.splash.backward * (1 - _DKV_SHARE)
    side = length / _TILE
    tiles = math.prod(lead) * side * (side + 1) / 2 * (width / 128)
    traffic = (operand_bytes + program.array_bytes(call.type)) / chip.hbm_bandwidth
    return tiles * rate + traffic
