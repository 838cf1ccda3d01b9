"""The engine of merging: the same tensor of every ingredient through one function, block by block.

A method is a function on values; it knows neither files nor models. Ingredients are any model path;
what is not a Hugging Face directory is first exported to one beside the output, one ingredient at a
time, so that memory holds at most one model, and for Hugging Face directories one tensor.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import numpy as np

from olmax.errors import UserError
from olmax.interop import layout, source
from olmax.interop.check import check_tensors
from olmax.interop.load import load_config
from olmax.interop.save import DEFAULT_SHARD_BYTES, DTYPES, save_huggingface, write_huggingface
from olmax.interop.tensor_files import TensorFiles
from olmax.interop.tokenizer_files import TokenizerLike, find_tokenizer
from olmax.models.config import DecoderConfig

Method = Callable[[str, Sequence[np.ndarray]], np.ndarray]
"""`method(name, values)`: the merged float32 block of a tensor from the float32 blocks of the
ingredients, in their order. A method that works on differences takes one ingredient as the base.
"""

# Fields of a configuration that say how a model was initialised, not what it computes.
_IRRELEVANT = ("init", "init_std")


def merge(
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    method: Method,
    *,
    dtype: str | None = None,
    tokenizer: TokenizerLike | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Merges models of one architecture into a new Hugging Face directory.

    Args:
      paths: at least two model paths: Hugging Face directories, hub ids, Orbax checkpoints, OLMo
        checkpoints; mixed as you like.
      output: the directory to create; it appears, complete, at the end.
      method: what to do with the values.
      dtype: of the output; None keeps the ingredients' where all are stored in the same one, else
        float32.
      tokenizer: a `tokenizer.json`, its directory or a tokenizer object; None takes the
        ingredients' (they must agree).
      max_shard_bytes: above this the weights are split over several files.

    Raises:
      UserError: fewer than two models, different architectures or tokenizers, damaged or
        unsupported checkpoints, or an output directory that exists.
    """
    if len(paths) < 2:
        raise UserError(f"merging needs at least two models, got {len(paths)}")
    with contextlib.ExitStack() as stack:
        ingredients = [_open(path, output, stack) for path in paths]
        config = ingredients[0].config
        for other in ingredients[1:]:
            _check_same(ingredients[0], other)
        if tokenizer is None:
            tokenizer = _common_tokenizer(ingredients)
        if dtype is None:
            stored = {each.files.dtype for each in ingredients}
            dtype = stored.pop() if len(stored) == 1 else None
            dtype = dtype if dtype in DTYPES else "float32"

        def merged(name: str, pieces: tuple[layout.Piece, ...]) -> np.ndarray:
            shape = layout.tensor_shape(pieces, config)
            out = np.empty(shape, np.float32)
            for row, block in ingredients[0].files.blocks(name, 0, shape[0]):
                rows = slice(row, row + len(block))
                values = [
                    each.files.read_rows(name, rows.start, rows.stop) for each in ingredients[1:]
                ]
                out[rows] = method(name, [value.astype(np.float32) for value in (block, *values)])
            return out

        write_huggingface(
            output,
            config,
            merged,
            dtype=dtype,
            tokenizer=tokenizer,
            max_shard_bytes=max_shard_bytes,
        )


@dataclasses.dataclass(frozen=True)
class _Ingredient:
    path: str
    directory: pathlib.Path
    config: DecoderConfig
    files: TensorFiles


def _open(
    path: str | os.PathLike, output: str | os.PathLike, stack: contextlib.ExitStack
) -> _Ingredient:
    if source.detect(path) == "huggingface":
        directory = source.local_directory(path)
    else:
        directory = _export(path, output, stack)
    config = load_config(directory)
    files = stack.enter_context(TensorFiles(directory))
    check_tensors(files, layout.huggingface(config), config)
    return _Ingredient(os.fspath(path), directory, config, files)


def _export(
    path: str | os.PathLike, output: str | os.PathLike, stack: contextlib.ExitStack
) -> pathlib.Path:
    """The model at `path` as a temporary Hugging Face directory on the disk of the output."""
    from olmax import pretrained

    parent = pathlib.Path(output).parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=".olmax-merge-", dir=parent))
    directory = pathlib.Path(scratch) / "model"
    save_huggingface(
        pretrained.load_model(os.fspath(path)), directory, tokenizer=find_tokenizer(path)
    )
    return directory


def _check_same(first: _Ingredient, other: _Ingredient) -> None:
    a, b = dataclasses.asdict(first.config), dataclasses.asdict(other.config)
    differences = [
        f"{key} is {b[key]!r} instead of {a[key]!r}"
        for key in a
        if a[key] != b[key] and key not in _IRRELEVANT
    ]
    if differences:
        raise UserError(
            f"{other.path}: not the same architecture as {first.path}: {', '.join(differences)}"
        )


def _common_tokenizer(ingredients: Sequence[_Ingredient]) -> pathlib.Path | None:
    files = [each.directory / "tokenizer.json" for each in ingredients]
    files = [file for file in files if file.is_file()]
    for file in files[1:]:
        if file.read_bytes() == files[0].read_bytes():
            continue
        if _vocabulary(file) != _vocabulary(files[0]):
            raise UserError(
                f"{file}: another vocabulary than {files[0]}; models that read tokens differently "
                "cannot be merged (give the tokenizer if they do not)"
            )
    return files[0] if files else None


def _vocabulary(file: pathlib.Path) -> tuple:
    values = source.read_mapping(file)
    model = values.get("model") or {}
    return json.dumps([model.get("vocab"), model.get("merges")], sort_keys=True), [
        (token.get("id"), token.get("content")) for token in values.get("added_tokens") or []
    ]
