"""One table of all kernels' benchmarks: `make bench-kernels`.

An op takes part by a module `kernels_pallas/<op>/benchmark.py` with a function `rows()` that yields
`Row`s. The table goes to the screen and, with the versions it came from, to BENCHMARK.md here.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import pathlib
import pkgutil
import platform
from collections.abc import Iterable, Iterator

import kernels_pallas

TABLE = pathlib.Path(__file__).parent / "BENCHMARK.md"
PACKAGES = ("jax", "jaxlib", "libtpu")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Every number says its unit in `metric`; `baseline` is the same metric of what the kernel is
    compared with, and `against` says what that is.
    """

    op: str
    case: str
    """Pass, shape and dtype."""
    device: str
    """A chip generation that was compiled for, or the device it ran on."""
    metric: str
    value: float | None
    """None: could not be run here; `note` says why."""
    baseline: float | None = None
    against: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        return self.value / self.baseline if self.value is not None and self.baseline else None


def ops() -> list[str]:
    """Folders of this package that have a benchmark."""
    root = pathlib.Path(__file__).parent
    return sorted(
        module.name
        for module in pkgutil.iter_modules(kernels_pallas.__path__)
        if module.ispkg and (root / module.name / "benchmark.py").exists()
    )


def rows(names: Iterable[str]) -> Iterator[Row]:
    for name in names:
        yield from importlib.import_module(f"kernels_pallas.{name}.benchmark").rows()


def versions() -> str:
    """Of everything the numbers depend on."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


HEADER = (
    "| op | case | device | metric | value | baseline | ratio | against | note |\n"
    "|---|---|---|---|---:|---:|---:|---|---|"
)


def line(row: Row) -> str:
    def number(value: float | None, digits: str = ",.4g") -> str:
        if value is None:
            return "-"
        return f"{value:,.0f}" if abs(value) >= 1000 else format(value, digits)

    cells = [
        row.op,
        row.case,
        row.device,
        row.metric,
        number(row.value),
        number(row.baseline),
        number(row.ratio, ".2f"),
        row.against,
        row.note,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="One table of all kernels' benchmarks.")
    parser.add_argument("ops", nargs="*", help=f"ops to run instead of all: {', '.join(ops())}")
    arguments = parser.parse_args()
    print(versions(), HEADER, sep="\n", flush=True)
    lines = []
    for row in rows(arguments.ops or ops()):
        lines.append(line(row))
        print(lines[-1], flush=True)
    if arguments.ops:
        return
    text = "\n".join(
        [
            "# Benchmarks of the kernels",
            "",
            f"Written by `make bench-kernels`. {versions()}.",
            "Bundles are static VLIW schedules, not times: see `kernels_pallas/schedule.py`.",
            "",
            HEADER,
            *lines,
            "",
        ]
    )
    TABLE.write_text(text)


if __name__ == "__main__":
    main()
