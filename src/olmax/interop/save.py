"""`Decoder` -> Hugging Face directory, one tensor at a time."""

import contextlib
import functools
import json
import os
from collections.abc import Callable
from typing import IO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from olmax.errors import UserError
from olmax.interop import hf_config, layout, tokenizer_files
from olmax.interop.layout import Piece
from olmax.interop.output_directory import new_directory
from olmax.models.config import DecoderConfig
from olmax.models.decoder import Decoder

DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
DEFAULT_SHARD_BYTES = 5 * 10**9


def save_huggingface(
    model: Decoder,
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    tokenizer: tokenizer_files.TokenizerLike | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a directory that transformers loads: config, weights, generation defaults and
    tokenizer.

    Tensors are taken out of the stacked parameters one at a time, so there is never a second copy
    of the model. In a multi-host run all hosts call this and the first one writes.

    Args:
      model: any `Decoder`; sharded ones are gathered tensor by tensor.
      path: the directory to create; it appears, complete, under this name at the end.
      dtype: float32, bfloat16 or float16; None keeps that of the parameters.
      tokenizer: a `tokenizer.json`, a directory that holds one, or a tokenizer object; None writes
        no tokenizer.
      max_shard_bytes: above this the weights are split over several files with an index.

    Raises:
      UserError: the directory exists and is not empty, no Hugging Face model computes this
        architecture, there is no such tokenizer, a value is too large for float16, or the disk is
        full.
    """
    flat = {
        ".".join(map(str, name)): leaf.get_value()
        for name, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    write_huggingface(
        path,
        model.config,
        lambda name, pieces: _extract(flat[pieces[0].param], pieces[0], model.config),
        dtype=dtype or model.execution.param_dtype,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
    )


def write_huggingface(
    path: str | os.PathLike,
    config: DecoderConfig,
    tensor: Callable[[str, tuple[Piece, ...]], np.ndarray],
    *,
    dtype: str,
    tokenizer: tokenizer_files.TokenizerLike | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face directory from `tensor(name, pieces)`, called once a tensor in the
    order of the files.

    Arguments and errors as in `save_huggingface`.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    names = layout.huggingface(config)
    hf_config.model_type(config)
    shapes = {name: layout.tensor_shape(pieces, config) for name, pieces in names.items()}
    files = _assign_files(shapes, DTYPES[dtype][1].itemsize, max_shard_bytes)
    writing = jax.process_index() == 0
    progress = tqdm(
        total=len(names), desc="writing", unit="tensor", delay=3, leave=False, disable=None
    )
    with new_directory(path) if writing else contextlib.nullcontext() as directory:
        for file, members in files.items():
            with contextlib.ExitStack() as stack:
                if directory is not None:
                    stream = stack.enter_context((directory / file).open("wb"))
                    _write_header(stream, {name: shapes[name] for name in members}, dtype)
                for name in members:
                    array = _cast(name, tensor(name, names[name]), dtype)
                    if array.shape != shapes[name]:
                        raise ValueError(
                            f"{name} has shape {array.shape}, should be {shapes[name]}"
                        )
                    if directory is not None:
                        stream.write(
                            memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                        )
                    progress.update()
        progress.close()
        if directory is not None:
            if len(files) > 1:
                _write_index(directory, files, shapes, dtype)
            special = (
                tokenizer_files.copy_tokenizer(tokenizer, directory, vocab_size=config.vocab_size)
                if tokenizer is not None
                else {}
            )
            _write_json(
                directory / "generation_config.json", {"_from_model_config": True, **special}
            )
            _write_json(
                directory / "config.json", hf_config.to_huggingface(config, dtype=dtype, **special)
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("olmax save_huggingface")


def _assign_files(
    shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int
) -> dict[str, list[str]]:
    """File name -> tensors in it; a tensor larger than `max_bytes` gets a file of its own."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * itemsize
        if not groups or size > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, 1)
    }


def _write_header(stream: IO[bytes], shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """The head of a safetensors file: length (8 bytes, little-endian), then JSON; the tensors
    follow in this order.

    Written here because the library writes whole files from memory only.
    """
    tag, numpy_dtype = DTYPES[dtype]
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + int(np.prod(shape, dtype=np.int64)) * numpy_dtype.itemsize
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def _write_index(
    directory: epath.Path,
    files: dict[str, list[str]],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
) -> None:
    total = (
        sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
        * DTYPES[dtype][1].itemsize
    )
    weight_map = {name: file for file, members in files.items() for name in members}
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_json(file: epath.Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def _cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    target = DTYPES[dtype][1]
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(target)
    if dtype == "float16" and not np.isfinite(cast).all() and np.isfinite(array).all():
        raise UserError(
            f"{name}: values beyond 65504 do not fit in float16; export as bfloat16 or float32"
        )
    return cast


def _extract(array: jax.Array, piece: Piece, config: DecoderConfig) -> np.ndarray:
    """The stored tensor of a piece, on the host, in the parameter's dtype."""
    axes = layout.PARAMETERS[piece.param]
    starts, counts = [], []
    chosen = {"N": (piece.layer or 0, 1), "C": piece.fused}
    if piece.expert is not None:
        chosen["E"] = (piece.expert, 1)
    for letter, size in zip(axes, array.shape, strict=True):
        start, count = chosen.get(letter, (0, size))
        starts.append(np.int32(start))
        counts.append(count)
    part = _slice(
        array,
        tuple(starts),
        counts=tuple(counts),
        squeeze=tuple(i for i, letter in enumerate(axes) if letter not in piece.axes),
        permutation=_permutation(
            "".join(letter for letter in axes if letter in piece.axes), piece.axes
        ),
        shape=layout.piece_shape(piece, config),
    )
    if not part.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(part, tiled=True))
    return np.asarray(part)


def _permutation(source: str, target: str) -> tuple[int, ...]:
    return tuple(source.index(letter) for letter in target)


@functools.partial(jax.jit, static_argnames=("counts", "squeeze", "permutation", "shape"))
def _slice(array, starts, *, counts, squeeze, permutation, shape):
    part = jax.lax.squeeze(jax.lax.dynamic_slice(array, starts, counts), squeeze)
    return jnp.transpose(part, permutation).reshape(shape)
