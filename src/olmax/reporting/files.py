"""Result files: whole or absent, and readable by any JSON parser."""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

PACKAGES = ("olmax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def jsonable(value: Any) -> Any:
    """`value` as plain JSON types.

    Dataclasses become objects, tuples lists, numpy scalars and arrays numbers and lists, paths
    strings; a number that JSON cannot hold (nan, inf) becomes null.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: jsonable(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, np.generic | np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON: {value!r}")


def write_text(path: epath.PathLike, text: str) -> epath.Path:
    """Writes a whole file under a temporary name and renames it: never half a file at `path`."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def write_json(path: epath.PathLike, value: Any) -> epath.Path:
    """Writes `jsonable(value)`, indented, keys in the order given."""
    return write_text(path, json.dumps(jsonable(value), indent=1, ensure_ascii=False) + "\n")


def environment() -> dict[str, Any]:
    """Versions and hardware that belong beside every measured number."""
    import jax

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": f"{sys.platform} {platform.machine()}",
        "cpus": _usable_cpus(),
        "device": devices[0].device_kind,
        "backend": devices[0].platform,
        "devices": len(devices),
    }


def _usable_cpus() -> int:
    # What this process may run on, which in a container is often less than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
