"""OLMo's token files: named .npy, but raw little-endian integers without a numpy header."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from olmax.data.instances import InstanceSource
from olmax.errors import UserError


def open_tokens(path: str | os.PathLike, dtype: str = "uint32") -> np.ndarray:
    """Memory-maps a raw token file as a flat array.

    Raises:
        UserError: the file is missing, empty, has a numpy header, or its size is not a whole number
            of tokens.
    """
    path = pathlib.Path(path)
    little = np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such token file") from e
    if size == 0:
        raise UserError(f"{path}: empty token file; remove it from the list or write it again")
    with path.open("rb") as f:
        if f.read(6) == b"\x93NUMPY":
            raise UserError(
                f"{path}: has a numpy header, raw tokens are expected; write it with array.tofile "
                "instead of numpy.save"
            )
    if size % little.itemsize:
        raise UserError(
            f"{path}: {size} bytes is not a whole number of {dtype} tokens; the file is cut short "
            "or of another type"
        )
    return np.memmap(path, little, mode="r")


def write_tokens(
    path: str | os.PathLike, tokens: Iterable[np.ndarray], dtype: str = "uint32"
) -> int:
    """Writes arrays of token ids one after the other into a raw token file; returns the number of
    tokens.

    The file appears under its name only when it is complete.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    little = np.dtype(dtype).newbyteorder("<")
    count = 0
    try:
        with partial.open("wb") as f:
            for array in tokens:
                f.write(np.ascontiguousarray(array, little).data)
                count += array.size
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        raise
    return count


class NpySource:
    """Instances in raw token files: chunks inside one file, the tail of each file dropped."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        *,
        name: str,
        sequence_length: int,
        eos_id: int,
        dtype: str = "uint32",
    ):
        """Maps the files; nothing is read yet.

        Raises:
            UserError: no files, or one of them is unusable or shorter than one instance.
        """
        if not paths:
            raise UserError(f"source {name!r}: no token files given")
        self.name = name
        self.sequence_length = sequence_length
        self.eos_id = eos_id
        self._paths = [pathlib.Path(p) for p in paths]
        self._files_IL = []
        digest = hashlib.sha256(f"{dtype}/{sequence_length}".encode())
        for path in self._paths:
            tokens = open_tokens(path, dtype)
            count = len(tokens) // sequence_length
            if count == 0:
                raise UserError(
                    f"{path}: {len(tokens)} tokens are less than one instance of "
                    f"{sequence_length}; "
                    "leave the file out or lower the sequence length"
                )
            self._files_IL.append(tokens[: count * sequence_length].reshape(count, sequence_length))
            digest.update(_ends(path))
        self._ends = list(itertools.accumulate(len(f) for f in self._files_IL))
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The instances at `indices`, unsigned integers [B, L]."""
        return np.stack([self._files_IL[f][i] for f, i in map(self._place, indices)])

    def locate(self, index: int) -> str:
        """File and chunk of an instance."""
        file, i = self._place(index)
        return f"{self._paths[file]} chunk {i}"

    def _place(self, index: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)


def _ends(path: pathlib.Path, count: int = 1 << 16) -> bytes:
    # The size and both ends tell released files apart; reading terabytes to begin a run would not
    # do.
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(count)
        f.seek(max(0, size - count))
        return hashlib.sha256(f"{path.name}/{size}/".encode() + head + f.read(count)).digest()


def export_npy(
    source: InstanceSource, path: str | os.PathLike, *, dtype: str = "uint32", batch: int = 1024
) -> int:
    """Writes the instances of any source as one raw token file; returns the number of tokens."""
    starts = range(0, len(source), batch)
    arrays = (source.read(range(start, min(start + batch, len(source)))) for start in starts)
    return write_tokens(path, arrays, dtype)
