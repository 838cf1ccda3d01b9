"""Reading the safetensors files of a directory, a few rows at a time."""

import base64
import binascii
import contextlib
import dataclasses
import json
import math
import pathlib
import pickletools
from collections.abc import Iterator
from typing import BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from olmax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Dtypes that can be read, by their name in the files."""

# Large enough that a transfer costs more than its call, small enough not to count beside any model
# worth streaming.
BLOCK_BYTES = 16 << 20

_TRANSFORMERS_REMEDY = (
    "load and save it once where torch is installed: "
    "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW_DIR)"
)
_REMEDIES = {
    "pytorch_model.bin": _TRANSFORMERS_REMEDY,
    "pytorch_model.bin.index.json": _TRANSFORMERS_REMEDY,
    "model.pt": "save it where torch is installed: "
    "safetensors.torch.save_file(torch.load('model.pt'), 'model.safetensors')",
    "model_and_optim": "unshard it where OLMo-core is installed: olmo_core.distributed.checkpoint."
    "unshard_checkpoint('DIR/model_and_optim', 'NEW_DIR', optim=False, use_safetensors=True), and "
    "copy config.json beside it",
    "model": "unshard it where OLMo is installed: "
    "python scripts/unshard.py DIR NEW_DIR --model-only --safe-tensors",
}
"""What to do about files that need torch to be read, by file or directory name."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says of a tensor."""

    file: pathlib.Path
    offset: int
    """First byte of the tensor in the file."""
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a checkpoint directory by name. Open as a context manager.

    The safetensors library checks the files and reads their headers. Rows are read here: the
    library would either map whole files into memory or read whole tensors.

    Attributes:
      infos: header information of every tensor.
      index: where the names come from, for messages.
    """

    def __init__(self, directory: pathlib.Path):
        """Opens `model.safetensors`, or the files of `model.safetensors.index.json`.

        Raises:
          UserError: no such file, a file that is missing, cut short or no safetensors file, or
            tensors that are not in the file the index names.
        """
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self._open: dict[pathlib.Path, BinaryIO] = {}
        self.infos: dict[str, TensorInfo] = {}
        try:
            self._open_all()
        except BaseException:
            self._stack.close()
            raise

    def _open_all(self) -> None:
        single = self.directory / "model.safetensors"
        index = self.directory / "model.safetensors.index.json"
        if single.exists():
            self.index = single
            self._add(single)
        elif index.exists():
            self.index = index
            weight_map = _weight_map(index)
            for name in sorted(set(weight_map.values())):
                self._add(self.directory / name)
            for name, file in weight_map.items():
                if name not in self.infos or self.infos[name].file.name != file:
                    raise UserError(
                        f"{index}: says that {name} is in {file}, which does not hold it; fetch "
                        "the files again"
                    )
            for name in self.infos.keys() - weight_map.keys():
                raise UserError(
                    f"{index}: does not list {name}, which {self.infos[name].file.name} holds; "
                    "the files do not belong together"
                )
        else:
            for name, remedy in _REMEDIES.items():
                if (self.directory / name).exists():
                    raise UserError(
                        f"{self.directory / name}: torch files cannot be read here; {remedy}"
                    )
            raise UserError(
                f"{self.directory}: no model.safetensors and no model.safetensors.index.json"
            )

    def _add(self, file: pathlib.Path) -> None:
        if not file.exists():
            raise UserError(f"{file}: missing, although {self.index.name} names it; fetch it again")
        try:
            with safetensors.safe_open(file, framework="numpy") as handle:
                parts = {key: handle.get_slice(key) for key in handle.offset_keys()}
                headers = {key: (p.get_dtype(), p.get_shape()) for key, p in parts.items()}
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: cut short or not a safetensors file ({error}); fetch it again"
            ) from None
        stream = self._stack.enter_context(file.open("rb"))
        self._open[file] = stream
        # The format: eight bytes of header length, the header, then the tensors without gaps.
        offset = 8 + int.from_bytes(stream.read(8), "little")
        for key, (dtype, shape) in headers.items():
            name = decode_name(key)
            if name in self.infos:
                raise UserError(f"{file}: tensor {name} is also in {self.infos[name].file.name}")
            self.infos[name] = TensorInfo(file, offset, tuple(shape), dtype)
            if dtype not in DTYPES:
                # Its size is unknown here, and with it where the next tensor begins.
                raise UserError(
                    f"{file}: tensor {name} is {dtype}; only {', '.join(DTYPES)} are supported"
                )
            offset += math.prod(shape) * DTYPES[dtype].itemsize

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exc_info) -> None:
        self._stack.close()

    @property
    def dtype(self) -> str | None:
        """The dtype in which all tensors are stored; None if they differ."""
        found = {info.dtype for info in self.infos.values()}
        return DTYPES[found.pop()].name if len(found) == 1 else None

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start..stop of a tensor, in the dtype of the file."""
        info = self.infos[name]
        dtype = DTYPES[info.dtype]
        row = math.prod(info.shape[1:])
        stream = self._open[info.file]
        stream.seek(info.offset + start * row * dtype.itemsize)
        count = (stop - start) * row * dtype.itemsize
        data = np.fromfile(stream, np.uint8, count)
        if len(data) < count:
            raise UserError(f"{info.file}: ends inside tensor {name}; fetch it again")
        return data.view(dtype).reshape(stop - start, *info.shape[1:])

    def blocks(
        self, name: str, start: int, stop: int, multiple: int = 1
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Rows start..stop in blocks of about `BLOCK_BYTES`, each with its first row.

        Blocks are multiples of `multiple` rows, which must divide stop - start.
        """
        row_bytes = 4 * math.prod(self.infos[name].shape[1:])
        rows = max(1, BLOCK_BYTES // (row_bytes * multiple)) * multiple
        for first in range(start, stop, rows):
            yield first, self.read_rows(name, first, min(first + rows, stop))


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{index}: not a safetensors index ({error!r}); fetch it again") from None


def decode_name(key: str) -> str:
    """The tensor name behind a key; the old OLMo trainer writes names as base64 of a pickled
    one-element tuple.

    The pickle is not executed: its only text operand is taken.
    """
    if "." in key or not key.startswith("gA"):  # base64 of pickle's protocol byte 0x80
        return key
    try:
        operations = list(pickletools.genops(base64.urlsafe_b64decode(key)))
    except (binascii.Error, ValueError):
        return key
    texts = [operand for _, operand, _ in operations if isinstance(operand, str)]
    return texts[0] if len(texts) == 1 else key
