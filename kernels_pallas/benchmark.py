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
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

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


def best_seconds(run: Callable[..., Any], *arguments: Any, repeats: int = 10) -> float:
    """The shortest of `repeats` runs on this machine's device, after one that is not counted."""
    jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


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


INTRODUCTION = """# Benchmarks of the kernels

Written by `make bench-kernels`. Bundles are static VLIW schedules, not times: see
`kernels_pallas/schedule.py`.
"""
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


def sections() -> dict[str, str]:
    """What the table says of each op."""
    if not TABLE.exists():
        return {}
    _, *parts = TABLE.read_text().split("\n## ")
    return {part.split("\n", 1)[0]: part.split("\n", 1)[1].strip() for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(description="One table of all kernels' benchmarks.")
    parser.add_argument("ops", nargs="*", help=f"ops to run instead of all: {', '.join(ops())}")
    names = parser.parse_args().ops or ops()
    print(versions(), HEADER, sep="\n", flush=True)
    for name in names:
        lines = []
        for row in rows([name]):
            lines.append(line(row))
            print(lines[-1], flush=True)
        write(name, lines)


def write(name: str, lines: list[str]) -> None:
    """Puts an op's rows into the table, with the versions they come from."""
    found = sections() | {name: "\n".join([versions() + ".", "", HEADER, *lines])}
    parts = [f"## {op}\n\n{found[op]}\n" for op in sorted(found)]
    TABLE.write_text("\n".join([INTRODUCTION, *parts]))


if __name__ == "__main__":
    main()
