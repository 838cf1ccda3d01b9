"""Plans beside published measurements: the error that every plan states as its own.

`python -m olmax.planning.calibration FILE` plans the published rows; `calibration.json` beside this
file is such a file, with the versions it was made with. Without rows, plans say that their error is
not known.
"""

import dataclasses
import functools
import json
import math
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmax.planning.plan import Plan


@dataclasses.dataclass(frozen=True)
class Row:
    """A published training speed.

    Compared by tokens, not by the MFU beside them: most of the published ones count the scores that
    the causal mask hides as work (llama3.1-8b: 45.5% of 918 TFLOP/s at 7,207 tokens/s are 57.9
    GFLOPs a token, with the whole of attention; 51.5 without the hidden half).
    """

    model: str
    topology: str
    batch_per_chip: int
    """Sequences; what the source's recipe uses, or our choice where it states none."""
    sequence_length: int
    tokens_per_second: float
    """Of one chip."""
    source: str

    @property
    def mfu(self) -> float:
        """By the FLOPs that plans count: products of matrices, causal attention by half."""
        from olmax.models.presets import get_preset
        from olmax.planning.topology import Topology

        flops = get_preset(self.model).matmul_flops_per_token(self.sequence_length)
        return self.tokens_per_second * flops / Topology.parse(self.topology).chip.peak_flops


_TIERS = "MaxText docs/reference/models/tiering.md"

PUBLISHED = (
    Row("llama3.1-8b", "v6e:16x16", 2, 8192, 7207, _TIERS),
    Row("llama2-70b", "v5p:8x8x8", 2, 4096, 692, _TIERS),
    Row("llama2-70b", "v6e:16x16", 2, 4096, 900, _TIERS),
    Row("llama3.1-70b", "v6e:16x16", 1, 8192, 960, _TIERS),
    Row("llama3.1-405b", "v6e:16x16", 1, 8192, 123, _TIERS),
    Row("mixtral-8x7b", "v5p:4x8x8", 4, 4096, 2909, _TIERS),
    Row("mixtral-8x7b", "v6e:16x16", 4, 4096, 3899, _TIERS),
)


@functools.cache
def measured() -> list[dict]:
    """Rows of the table: model, topology, published and planned MFU."""
    file = resources.files("olmax.planning").joinpath("calibration.json")
    return json.loads(file.read_text())["rows"]


def relative_error(*, quick: bool = False) -> float | None:
    """Root mean square of the relative error of the planned MFU over the table, or of that by quick
    plans; None if there are none.
    """
    planned = "quick_mfu" if quick else "planned_mfu"
    errors = [row[planned] / row["published_mfu"] - 1 for row in measured() if planned in row]
    if not errors:
        return None
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def measure(path: str, rows: tuple[Row, ...] = PUBLISHED) -> None:
    """Plans the published rows and writes them to `path` after each one; rows there are kept.

    The sources do not state what they recompute. Who publishes a speed saves as much as fits, so a
    row is planned with the first of `dots`, `projections` and `full` that does. If none does, half
    of the batch is tried, down to one sequence a chip.
    """
    import pathlib

    from olmax.reporting.files import environment, write_json

    file = pathlib.Path(path)
    found = json.loads(file.read_text())["rows"] if file.exists() else []
    done = {(row["model"], row["topology"]): row for row in found}
    for row in rows:
        result = done.get((row.model, row.topology))
        if result is None:
            result = _planned(row)
            if result is None:
                continue
            found.append(result)
        if "quick_mfu" not in result:
            made = _plan(row, result["batch_per_chip"], result["remat"], quick=True)
            result |= dict(quick_mfu=made.mfu, quick_seconds=made.plan_seconds)
        write_json(file, {"versions": environment()["versions"], "rows": found})
        print(
            f"{row.model} on {row.topology}: planned {result['planned_mfu']:.1%}, quickly "
            f"{result['quick_mfu']:.1%}, published {row.mfu:.1%}"
        )


def _planned(row: Row) -> dict | None:
    batch = row.batch_per_chip
    made = _quickest(row, batch)
    while not made.fits and batch > 1:
        batch //= 2
        made = _quickest(row, batch)
    if made.mfu is None:
        print(f"{row.model} on {row.topology}: {made.verdict}")
        return None
    return {
        "model": row.model,
        "topology": row.topology,
        "batch_per_chip": batch,
        "remat": made.remat,
        "sequence_length": row.sequence_length,
        "published_mfu": row.mfu,
        "planned_mfu": made.mfu,
        "step_seconds": made.step_seconds,
        "cycles": made.cycles,
        "total_bytes": made.per_device_bytes.total,
        "compile_seconds": made.compile_seconds,
        "source": row.source,
    }


def _quickest(row: Row, batch: int) -> "Plan":
    """The plan with the first policy that fits, else with `full`."""
    from olmax.models.presets import get_preset
    from olmax.planning.topology import Topology

    config, topology = get_preset(row.model), Topology.parse(row.topology)
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    # Values of a token that a layer saves at least; a policy that cannot fit is not compiled.
    projections = heads + config.n_heads * config.head_dim + config.d_model
    dots = projections + 2 * config.active_d_ff
    state = 12 * config.num_params / topology.num_chips
    for remat, width in (("dots", dots), ("projections", projections), ("full", 0)):
        saved = 2 * width * config.n_layers * batch * row.sequence_length
        if remat != "full" and state + saved > 0.85 * topology.chip.hbm_bytes:
            continue
        made = _plan(row, batch, remat)
        if made.fits:
            break
    return made


def _plan(row: Row, batch: int, remat: str, *, quick: bool = False) -> "Plan":
    from olmax.planning.plan import plan
    from olmax.planning.topology import Topology

    topology = Topology.parse(row.topology)
    return plan(
        row.model,
        topology,
        batch_size=batch * topology.num_chips,
        sequence_length=row.sequence_length,
        mesh=f"fsdp={topology.num_chips}",
        remat=remat,
        quick=quick,
    )


if __name__ == "__main__":
    import sys

    measure(sys.argv[1])
