"""Reads documents from files: json lines, text and parquet, plain or compressed."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from etils import epath

from olmax.data.documents import Document, DocumentSource
from olmax.errors import UserError

_FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".gz", ".zst", ".zstd")
FORMATS = ("jsonl", "text", "parquet")


def files(
    patterns: Iterable[epath.PathLike],
    *,
    name: str,
    format: str | None = None,
    text_field: str = "text",
) -> DocumentSource:
    """Documents of all files that the patterns name.

    Args:
        patterns: files, globs, or directories (all files below with a known ending); sorted within
            each pattern.
        name: of the source.
        format: "jsonl", "text" or "parquet"; None goes by the ending (.jsonl .json .ndjson, .txt
            .md, .parquet; the first two also with .gz or .zst).
        text_field: field or column that holds the text.

    Raises:
        UserError: a pattern matches nothing. Reading raises it for a damaged file, with file and
            line.
    """
    paths = expand(patterns)

    def read() -> Iterator[Document]:
        for path in paths:
            yield from read_file(path, source=name, format=format, text_field=text_field)

    digest = hashlib.sha256(f"files-1/{format}/{text_field}".encode())
    for path in paths:
        digest.update(_content_digest(path))
    return DocumentSource(name=name, fingerprint=digest.hexdigest()[:16], read=read)


def expand(patterns: Iterable[epath.PathLike]) -> list[epath.Path]:
    """Files, globs and directories to a list of files.

    Raises:
        UserError: a pattern matches nothing.
    """
    found: list[epath.Path] = []
    for pattern in patterns:
        path = epath.Path(pattern)
        if path.is_dir():
            matches = [p for p in _walk(path) if _format_of(p)]
        elif path.exists():
            matches = [path]
        elif any(c in str(pattern) for c in "*?["):
            matches = _glob(path)
        else:
            matches = []
        if not matches:
            raise UserError(f"{pattern}: no such file, and no files match it; check the path")
        found += [p for p in matches if p not in found]
    if not found:
        raise UserError("no input files given")
    return found


def read_file(
    path: epath.PathLike, *, source: str, format: str | None = None, text_field: str = "text"
) -> Iterator[Document]:
    """Documents of one file, in order. Text files are one document each.

    Raises:
        UserError: unknown format, no documents, or a line (row) that cannot be read; says which.
    """
    path = epath.Path(path)
    format = format or _format_of(path)
    if format not in FORMATS:
        raise UserError(
            f"{path}: unknown format; endings read are {' '.join(_FORMATS)} (with "
            f"{' '.join(_COMPRESSIONS)}), "
            f"or name one of {', '.join(FORMATS)}"
        )
    reader = {"jsonl": _read_jsonl, "text": _read_text, "parquet": _read_parquet}[format]
    empty = True
    for document in reader(path, source, text_field):
        empty = False
        yield document
    if empty:
        raise UserError(
            f"{path}: holds no documents; remove the file from the input or write it again"
        )


def read_records(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a json lines file, plain or compressed; empty lines are
    skipped. The place is `file:line`, for messages.

    Raises:
        UserError: a line that is not UTF-8 or no JSON object, or compressed data that ends early.
    """
    path = epath.Path(path)
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            content = line.decode("utf-8").strip()
        except UnicodeDecodeError as e:
            raise UserError(
                f"{where}: not UTF-8 (byte 0x{line[e.start]:02x} at column {e.start + 1}); convert "
                "the file to UTF-8"
            ) from e
        if not content:
            continue
        try:
            record: Any = json.loads(content)
        except json.JSONDecodeError as e:
            raise UserError(
                f"{where}: not a JSON object ({e.msg} at column {e.colno}); the line is cut short "
                "or damaged, mend or remove it"
            ) from e
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: a JSON object a line is expected, this is {_json_type(record)}"
            )
        yield where, record


def text_of(record: dict[str, Any], field: str, where: str) -> str:
    """The text in `field` of a record.

    Raises:
        UserError: the field is absent, holds no string, or one that no encoding has.
    """
    text = record.get(field)
    if not isinstance(text, str):
        what = "has no" if field not in record else f"has {_json_type(text)} as"
        raise UserError(f"{where}: {what} text field {field!r}; fields are {', '.join(record)}")
    _check_text(text, where)
    return text


def _read_jsonl(path: epath.Path, source: str, text_field: str) -> Iterator[Document]:
    for where, record in read_records(path):
        text = text_of(record, text_field, where)
        yield Document(text=text, id=str(record.get("id", where)), source=source)


def _read_text(path: epath.Path, source: str, text_field: str) -> Iterator[Document]:
    del text_field  # the whole file is the text
    lines = []
    for number, line in _lines(path):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            raise UserError(
                f"{path}:{number}: not UTF-8 (byte 0x{line[e.start]:02x} at column {e.start + 1}); "
                "convert the file to UTF-8"
            ) from e
    text = "".join(lines)
    if text.strip():
        yield Document(text=text, id=str(path), source=source)


def _read_parquet(path: epath.Path, source: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as f:
            table = pyarrow.parquet.ParquetFile(f)
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise UserError(
                    f"{path}: has no column {text_field!r}; columns are {', '.join(columns)}"
                )
            row = 0
            wanted = [text_field] + (["id"] if "id" in columns and text_field != "id" else [])
            for batch in table.iter_batches(batch_size=1024, columns=wanted):
                values = batch.to_pydict()
                ids = values.get("id", [None] * batch.num_rows)
                for text, identifier in zip(values[text_field], ids, strict=True):
                    where = f"{path} row {row}"
                    if not isinstance(text, str):
                        raise UserError(
                            f"{where}: column {text_field!r} holds no text ({type(text).__name__})"
                        )
                    yield Document(
                        text=text,
                        id=where if identifier is None else str(identifier),
                        source=source,
                    )
                    row += 1
    except (pyarrow.ArrowException, OSError) as e:
        reason = " ".join(str(e).split())[:120]
        raise UserError(
            f"{path}: not a whole parquet file ({reason}); fetch or write it again"
        ) from e


def _lines(path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of a plain or compressed file."""
    number = 0
    try:
        with _open(path) as f:
            for line in f:
                number += 1
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error, _zstd_error()) as e:
        raise UserError(
            f"{path}:{number + 1}: compressed data ends early or is damaged ({e}); fetch or write "
            "the file again"
        ) from e


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as f:
                yield io.BufferedReader(f)  # type: ignore[arg-type]
        elif path.suffix in (".zst", ".zstd"):
            yield io.BufferedReader(_ZstdStream(raw))
        else:
            yield raw


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


class _ZstdStream(io.RawIOBase):
    """Decompresses frame after frame, and unlike the library's reader notices a cut one."""

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._inside = False  # bytes of a frame were read and its end was not
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = self._raw.read(1 << 17)
            if not piece:
                if self._inside:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            out = []
            while piece:
                out.append(self._frame.decompress(piece))
                self._inside = not self._frame.eof
                piece = self._frame.unused_data
                if self._frame.eof:
                    self._frame = self._new()
                else:
                    break
            self._ready = b"".join(out)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _check_text(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise UserError(
                f"{where}: text holds half of a surrogate pair at character {e.start}, which no "
                "encoding has; mend the line"
            ) from e


def _format_of(path: epath.Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes = suffixes[:-1]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    for path in sorted(directory.iterdir()):
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _glob(pattern: epath.Path) -> list[epath.Path]:
    if "://" in str(pattern) and "**" in str(pattern):
        raise UserError(f"{pattern}: ** is not for remote paths; give the directory itself")
    # The longest directory without a wildcard is where to look; the rest is the pattern.
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = epath.Path(*parts[:first]) if first else epath.Path(".")
    below = "/".join(parts[first:])
    if "**" in below:
        matches = [epath.Path(p) for p in pathlib.Path(root).glob(below)]
    else:
        matches = list(root.glob(below))
    return sorted(p for p in matches if p.is_file())


def _content_digest(path: epath.Path) -> bytes:
    digest = hashlib.sha256(path.name.encode())
    with path.open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.digest()


def _json_type(value: object) -> str:
    names: Sequence[tuple[type, str]] = (
        (bool, "a boolean"), (dict, "an object"), (list, "an array"), (str, "a string"),
        (int, "a number"), (float, "a number"),
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), "null")
