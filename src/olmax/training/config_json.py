"""Configurations as JSON that names its classes, so that a stored one rebuilds itself.

A dataclass becomes an object with `class` ("module:name") and its fields; tuples become arrays.
"""

import dataclasses
import importlib
import json
import os
from typing import Any

from etils import epath

from olmax.errors import UserError

# A file must not be able to import whatever it likes.
_PACKAGES = ("olmax", "experiments")


def to_json(config: Any) -> Any:
    """JSON-able value of a configuration: dataclasses, dicts, sequences, strings, numbers, None.

    Raises:
      TypeError: a value of another kind.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        cls = type(config)
        fields = {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
        return {"class": f"{cls.__module__}:{cls.__qualname__}"} | fields
    if isinstance(config, dict):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_json(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise TypeError(f"cannot store {type(config).__name__} in a configuration: {config!r}")


def from_json(value: Any, where: str = "config") -> Any:
    """The configuration that `to_json` made the value of; arrays become tuples.

    Raises:
      UserError: an unknown class or field, a missing one, or a value a class refuses.
    """
    if isinstance(value, list):
        return tuple(from_json(item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    fields = {
        key: from_json(item, f"{where}.{key}") for key, item in value.items() if key != "class"
    }
    if "class" not in value:
        return fields
    cls = _find_class(value["class"], where)
    known = {field.name for field in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            raise UserError(
                f"{where}: unknown key {key!r} for {cls.__name__}; it has "
                f"{', '.join(sorted(known))}"
            )
    try:
        return cls(**fields)
    except (TypeError, UserError) as error:
        raise UserError(f"{where}: {error}") from error


def _find_class(name: Any, where: str) -> Any:
    module, _, qualname = str(name).partition(":")
    if module.split(".")[0] in _PACKAGES:
        try:
            found = importlib.import_module(module)
            for part in qualname.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            found = None
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            return found
    raise UserError(f"{where}: {name!r} is no configuration class of this version")


def load(path: str | os.PathLike) -> Any:
    """The configuration stored in a file.

    Raises:
      UserError: no such file, no JSON, or see `from_json`.
    """
    path = epath.Path(path)
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no configuration at {path}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    return from_json(value, str(path))


def dump(config: Any, path: str | os.PathLike) -> None:
    """Stores a configuration in a file."""
    write_text(epath.Path(path), json.dumps(to_json(config), indent=2) + "\n")


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file completely or not at all."""
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)
