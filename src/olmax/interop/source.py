"""What a model path is: a local directory, a remote one, or a hub id; and which code base wrote
it.
"""

import atexit
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from etils import epath

from olmax.errors import UserError

Kind = Literal["huggingface", "olmo_trainer", "olmo_core"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.yaml", "tokenizer*")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint of another code base, on the local disk."""

    kind: Kind
    directory: pathlib.Path
    config_file: pathlib.Path


def resolve(path: str | os.PathLike) -> Source:
    """Finds the checkpoint that `path` names; remote directories and hub repositories are fetched
    first.

    Raises:
      UserError: nothing is there, the hub cannot be reached, or the directory is no known kind of
    checkpoint.
    """
    directory = local_directory(path)
    kind = detect(directory)
    if kind is None:
        raise UserError(
            f"{directory}: no checkpoint of Hugging Face (config.json with model_type), OLMo-core "
            "(config.json with model.block) or the OLMo trainer (config.yaml)"
        )
    return Source(
        kind, directory, directory / ("config.yaml" if kind == "olmo_trainer" else "config.json")
    )


def detect(path: str | os.PathLike) -> Kind | None:
    """The code base that wrote a checkpoint (any model path); None if none of those read here.

    Raises:
      UserError: there is no such directory, or the hub cannot be reached.
    """
    directory = epath.Path(path)
    if not directory.is_dir():
        directory = epath.Path(local_directory(path))
    config = directory / "config.json"
    if config.exists():
        values = read_mapping(config)
        if "model_type" in values:
            return "huggingface"
        model = values.get("model")
        core = isinstance(model, Mapping) and isinstance(model.get("block"), Mapping)
        return "olmo_core" if core else None
    return "olmo_trainer" if (directory / "config.yaml").exists() else None


def local_directory(path: str | os.PathLike) -> pathlib.Path:
    """A local directory with the contents of `path`.

    The files of a remote directory (gs://, s3://) are copied to a temporary one that lives as long
    as the process; a hub id (`owner/name`, with `@revision` for a branch or commit) is fetched into
    the hub's cache.

    Raises:
      UserError: nothing is there, or the hub cannot be reached.
    """
    text = os.fspath(path)
    if "://" in text:
        return _fetch_remote(text)
    local = pathlib.Path(text).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        raise UserError(
            f"{local}: a model path is a directory, this is a file; give the directory it is in"
        )
    if _HUB_ID.fullmatch(text):
        return _fetch_hub(text)
    raise UserError(f"{text}: no such directory, and not a hub id (owner/name)")


@functools.cache
def _fetch_remote(path: str) -> pathlib.Path:
    remote = epath.Path(path)
    if not remote.is_dir():
        raise UserError(f"{remote}: no such directory")
    local = pathlib.Path(tempfile.mkdtemp(prefix="olmax-model-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    for file in remote.iterdir():
        if file.is_file() and any(
            pathlib.PurePath(file.name).match(pattern) for pattern in _HUB_FILES
        ):
            file.copy(local / file.name)
    return local


def _fetch_hub(name: str) -> pathlib.Path:
    # Imported here: the hub client takes time to import, and local paths do not need it.
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=list(_HUB_FILES)
            )
        )
    except Exception as error:  # of the hub, of HTTP, of the network, of the disk
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{name}: no such directory, and not fetched from the hub either ({lines[0]})"
        ) from error


def read_mapping(file: pathlib.Path | epath.Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping.

    Raises:
      UserError: the file is not readable or holds something else.
    """
    try:
        text = file.read_text(encoding="utf-8")
        values = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: cannot be read ({reason})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: must hold a mapping of keys, holds a {type(values).__name__}")
    return values
