"""Prepared data: documents tokenised and packed once, in ArrayRecord shards that training reads in
any order.

A prepared directory holds `<source>-00000.array_record` and so on (one record is one instance: its
raw little-endian tokens), `tokenizer.json`, and `manifest.json`. The directory appears under its
name only when it is complete. ArrayRecord needs a file system: on a cloud bucket, mount it
(gcsfuse) as Grain does.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from olmax.data.documents import Document, DocumentSource
from olmax.data.packing import chunk
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# Uncompressed, one record a group: a shuffled read touches one instance and should unpack nothing
# else.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_NAME = re.compile(r"\w[\w.-]*")
_BATCH_BYTES = 1 << 21  # text handed to the tokenizer's threads at once


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a prepared source: its name, its instances and its size in bytes."""

    file: str
    instances: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class SourceManifest:
    """What preparation made of one source.

    Attributes:
        name: the source.
        documents: documents read.
        text_bytes: their length in UTF-8 bytes (0 for documents that came as tokens).
        tokens: tokens in all, end-of-text tokens included.
        instances: instances written; the tokens that did not fill one are dropped.
        input_fingerprint: of the documents (`DocumentSource.fingerprint`).
        fingerprint: of the tokens written, in order.
        shards: the files.
    """

    name: str
    documents: int
    text_bytes: int
    tokens: int
    instances: int
    input_fingerprint: str
    fingerprint: str
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        version: of this format.
        spec: fingerprint of everything that determined the result; an equal one is reused.
        fingerprint: of the result: the tokens of all sources, in order.
        sequence_length: tokens of an instance.
        dtype: `uint16` or `uint32`.
        vocab_size: of the tokenizer.
        eos_id: end-of-text token, after every document.
        tokenizer_fingerprint: of the tokenizer that made the tokens.
        sources: in the order given.
    """

    version: int
    spec: str
    fingerprint: str
    sequence_length: int
    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_fingerprint: str
    sources: tuple[SourceManifest, ...]

    @property
    def tokens(self) -> int:
        """Tokens in instances, over all sources."""
        return self.sequence_length * sum(s.instances for s in self.sources)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, directory: str | os.PathLike) -> Manifest:
        """Reads the manifest of a prepared directory.

        Raises:
            UserError: there is none, or it is not of this format.
        """
        path = pathlib.Path(directory) / MANIFEST
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            if raw["version"] != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format version {raw['version']}, this program reads "
                    f"{FORMAT_VERSION}; prepare again"
                )
            sources = tuple(
                SourceManifest(**{**s, "shards": tuple(Shard(**shard) for shard in s["shards"])})
                for s in raw.pop("sources")
            )
            return cls(**raw, sources=sources)
        except FileNotFoundError as e:
            raise UserError(
                f"{path}: not there, so {directory} is no prepared data; make it with `olmax "
                "prepare`"
            ) from e
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as e:
            raise UserError(
                f"{path}: damaged manifest ({e}); remove the directory and prepare again"
            ) from e


def prepare(
    sources: Sequence[DocumentSource],
    tokenizer: Tokenizer,
    output: str | os.PathLike,
    *,
    sequence_length: int,
    max_tokens: int | dict[str, int] | None = None,
    instances_per_shard: int = 65536,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Tokenises and packs documents into a prepared directory, or reuses it when it is the same.

    Each source is packed apart from the others, as OLMo packs each file apart.

    Args:
        sources: what to read; their names must differ.
        tokenizer: it is copied into the directory.
        output: directory to make (on a file system, not a bucket).
        sequence_length: tokens of an instance.
        max_tokens: stop a source once it has this many tokens; a dict gives a limit by source name.
        instances_per_shard: a new file is begun after so many.
        overwrite: replace a directory that was prepared from something else. (One that was
            prepared from the same and lost a shard is always made again.)
        progress: show a progress bar.

    Returns:
        The manifest, new or reused.

    Raises:
        UserError: bad input (from the sources), a source too short for one instance, duplicate
            names, or `output` holds something else and `overwrite` is off. Nothing is left behind
            then.
    """
    if "://" in str(output):
        raise UserError(
            f"{output}: prepared data needs a file system; mount the bucket and give that path"
        )
    output = pathlib.Path(output)
    names = [source.name for source in sources]
    if not names or len(set(names)) != len(names) or not all(map(_NAME.fullmatch, names)):
        raise UserError(
            f"sources must have different names of letters, digits and . _ -, got {names}"
        )
    if sequence_length < 2:
        raise UserError(f"sequence_length {sequence_length} is too short; give at least 2")
    limits = max_tokens if isinstance(max_tokens, dict) else dict.fromkeys(names, max_tokens)
    spec = _digest(
        json.dumps(
            {
                "version": FORMAT_VERSION,
                "tokenizer": [tokenizer.fingerprint, tokenizer.eos_id],
                "sequence_length": sequence_length,
                "instances_per_shard": instances_per_shard,
                "sources": [[s.name, s.fingerprint, limits.get(s.name)] for s in sources],
            }
        ).encode()
    )
    if (output / MANIFEST).exists():
        with contextlib.suppress(UserError) if overwrite else contextlib.nullcontext():
            manifest = Manifest.read(output)
            if manifest.spec == spec and _intact(output, manifest):
                return manifest
            if manifest.spec != spec and not overwrite:
                raise UserError(
                    f"{output}: prepared from other data, tokenizer or options; give another "
                    "directory, or overwrite it"
                )
    if output.exists() and not (output / MANIFEST).exists() and any(output.iterdir()):
        raise UserError(f"{output}: exists and is no prepared data; give another directory")

    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    partial = output.with_name(f"{output.name}.partial-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        done = [
            _prepare_source(
                source, tokenizer, partial, sequence_length, dtype, limits.get(source.name),
                instances_per_shard, progress,
            )
            for source in sources
        ]  # fmt: skip
        tokenizer.save(partial)
        manifest = Manifest(
            version=FORMAT_VERSION,
            spec=spec,
            fingerprint=_digest("/".join(f"{s.name}:{s.fingerprint}" for s in done).encode()),
            sequence_length=sequence_length,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            sources=tuple(done),
        )
        (partial / MANIFEST).write_text(manifest.to_json())
        if output.exists():
            # The manifest goes first: a directory that is half removed must not look prepared.
            (output / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(output)
        partial.rename(output)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{output}: cannot be written ({e.strerror or e}); make room or give another directory"
        ) from e
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def _intact(directory: pathlib.Path, manifest: Manifest) -> bool:
    """Whether all shards are there in full size, and the tokenizer."""
    for shard in (shard for source in manifest.sources for shard in source.shards):
        path = directory / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            return False
    return (directory / "tokenizer.json").is_file()


def _prepare_source(
    source: DocumentSource,
    tokenizer: Tokenizer,
    directory: pathlib.Path,
    sequence_length: int,
    dtype: str,
    max_tokens: int | None,
    instances_per_shard: int,
    progress: bool,
) -> SourceManifest:
    """Writes the shards of one source."""
    from tqdm import tqdm

    documents = text_bytes = tokens = 0
    bar = tqdm(
        desc=f"prepare {source.name}",
        unit="tok",
        unit_scale=True,
        disable=not progress,
        leave=False,
    )

    def counted() -> Iterator[Sequence[int]]:
        nonlocal documents, text_bytes, tokens
        for document, ids in _tokenised(source.read(), tokenizer):
            ended = len(ids) > 0 and ids[-1] == tokenizer.eos_id
            documents += 1
            text_bytes += len(document.text.encode())
            tokens += len(ids) + (not ended)
            bar.update(len(ids) + (not ended))
            yield ids
            if max_tokens is not None and tokens >= max_tokens:
                return

    limit = None if max_tokens is None else max_tokens // sequence_length
    packed = chunk(counted(), sequence_length=sequence_length, eos_id=tokenizer.eos_id, dtype=dtype)
    with bar, _ShardWriter(directory, source.name, instances_per_shard) as writer:
        for instance in itertools.islice(packed, limit):
            writer.write(instance.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tobytes())
    instances = sum(shard.instances for shard in writer.shards)
    if not instances:
        raise UserError(
            f"source {source.name!r}: {tokens} tokens in {documents} documents do not fill one "
            f"instance of {sequence_length}; give more text or a shorter sequence length"
        )
    return SourceManifest(
        name=source.name,
        documents=documents,
        text_bytes=text_bytes,
        tokens=tokens,
        instances=instances,
        input_fingerprint=source.fingerprint,
        fingerprint=writer.fingerprint,
        shards=tuple(writer.shards),
    )


def _tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, Sequence[int]]]:
    """Tokenises in batches large enough for the tokenizer's threads, in order."""

    def flush(batch: list[Document]) -> Iterator[tuple[Document, Sequence[int]]]:
        encoded = iter(tokenizer.encode_batch([d.text for d in batch if d.tokens is None]))
        for document in batch:
            ids = next(encoded) if document.tokens is None else document.tokens
            if document.tokens is not None and max(ids, default=0) >= tokenizer.vocab_size:
                raise UserError(
                    f"{document.id}: token id {max(ids)} is outside the vocabulary of "
                    f"{tokenizer.vocab_size}; it was made with another tokenizer"
                )
            yield document, ids

    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) if document.tokens is None else len(document.tokens)
        if size >= _BATCH_BYTES:
            yield from flush(batch)
            batch, size = [], 0
    yield from flush(batch)


class _ShardWriter:
    """Writes records into numbered shards; as a context manager it closes the last one."""

    def __init__(self, directory: pathlib.Path, name: str, instances_per_shard: int):
        self.shards: list[Shard] = []
        self._directory = directory
        self._name = name
        self._limit = instances_per_shard
        self._digest = hashlib.sha256()
        self._path = directory
        self._writer: Any = None
        self._count = 0

    @property
    def fingerprint(self) -> str:
        """Of all records so far."""
        return self._digest.hexdigest()[:16]

    def write(self, record: bytes) -> None:
        """Appends a record, in a new shard when the last one is full."""
        try:
            if self._writer is None:
                self._path = self._directory / f"{self._name}-{len(self.shards):05d}.array_record"
                self._writer = array_record_module.ArrayRecordWriter(
                    str(self._path), _WRITER_OPTIONS
                )
                self._count = 0
            self._writer.write(record)
        except RuntimeError as e:
            raise self._failure(e) from e
        self._digest.update(record)
        self._count += 1
        if self._count == self._limit:
            self._finish()

    def _finish(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        try:
            writer.close()
        except RuntimeError as e:
            raise self._failure(e) from e
        self.shards.append(Shard(self._path.name, self._count, self._path.stat().st_size))

    def _failure(self, error: RuntimeError) -> OSError:
        # The library reports a full disk as a RuntimeError of its own.
        return OSError(None, f"{self._path.name}: {' '.join(str(error).split())[:120]}")

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._finish()
        elif self._writer is not None:
            with contextlib.suppress(RuntimeError):  # the first error is the one to tell
                self._writer.close()


def _remove_abandoned(output: pathlib.Path) -> None:
    """Removes what killed preparations of `output` on this machine left behind."""
    prefix = f"{output.name}.partial-{socket.gethostname()}-"
    for path in output.parent.glob(prefix + "*"):
        pid = path.name.removeprefix(prefix)
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class PreparedSource:
    """One source of a prepared directory, for random access; see `instances.InstanceSource`."""

    def __init__(self, directory: str | os.PathLike, manifest: Manifest, source: SourceManifest):
        """Opens the shards.

        Raises:
            UserError: a shard is missing, was changed, or cannot be read.
        """
        self.name = source.name
        self.sequence_length = manifest.sequence_length
        self.eos_id = manifest.eos_id
        self.fingerprint = source.fingerprint
        self.manifest = source
        self._paths = [pathlib.Path(directory) / shard.file for shard in source.shards]
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._ends = list(itertools.accumulate(shard.instances for shard in source.shards))
        self._readers = [
            _open_shard(path, shard) for path, shard in zip(self._paths, source.shards, strict=True)
        ]

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The instances at `indices`, unsigned integers [B, L].

        Raises:
            UserError: a record cannot be read or has another length than the manifest says.
        """
        out = np.empty((len(indices), self.sequence_length), self._dtype)
        wanted: dict[int, list[tuple[int, int]]] = {}
        for row, index in enumerate(indices):
            shard, record = self._place(index)
            wanted.setdefault(shard, []).append((row, record))
        for shard, places in wanted.items():
            try:
                # One call for all records of a shard: the reader fetches them in parallel.
                records = self._readers[shard].read([record for _, record in places])
            except Exception as e:  # the library raises its own status errors
                raise UserError(
                    f"{self._paths[shard]}: cannot read records "
                    f"({' '.join(str(e).split())[:120]}); prepare again"
                ) from e
            for (row, record), content in zip(places, records, strict=True):
                if len(content) != out[row].nbytes:
                    raise UserError(
                        f"{self._paths[shard]} record {record}: {len(content)} bytes, expected "
                        f"{out[row].nbytes}; "
                        "the shard is damaged, prepare again"
                    )
                out[row] = np.frombuffer(content, self._dtype)
        return out

    def locate(self, index: int) -> str:
        """Shard and record of an instance."""
        shard, record = self._place(index)
        return f"{self._paths[shard]} record {record}"

    def _place(self, index: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)


def _open_shard(path: pathlib.Path, shard: Shard) -> Any:
    try:
        size = path.stat().st_size
    except FileNotFoundError as e:
        raise UserError(f"{path}: shard is missing; prepare again") from e
    if size != shard.bytes:
        raise UserError(f"{path}: {size} bytes, the manifest says {shard.bytes}; prepare again")
    try:
        # No read-ahead: neighbours of a record are not wanted in a shuffled order.
        reader = array_record_module.ArrayRecordReader(
            str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
        )
        count = reader.num_records()
    except Exception as e:  # the library raises its own status errors
        raise UserError(
            f"{path}: not readable ({' '.join(str(e).split())[:120]}); prepare again"
        ) from e
    if count != shard.instances:
        raise UserError(
            f"{path}: {count} records, the manifest says {shard.instances}; prepare again"
        )
    return reader


def open_prepared(
    directory: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    sources: Sequence[str] | None = None,
) -> list[PreparedSource]:
    """Opens the sources of a prepared directory for the loader.

    Args:
        directory: made by `prepare`.
        tokenizer: when given, must be the one the data was made with.
        sources: names of those wanted, in that order; all when None.

    Raises:
        UserError: no prepared data there, a damaged shard, another tokenizer, or an unknown source.
    """
    manifest = Manifest.read(directory)
    if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise UserError(
            f"{directory}: made with tokenizer {manifest.tokenizer_fingerprint}, this one is "
            f"{tokenizer.fingerprint}; "
            "prepare again with it or use the tokenizer.json in that directory"
        )
    by_name = {source.name: source for source in manifest.sources}
    unknown = [name for name in sources or () if name not in by_name]
    if unknown:
        raise UserError(f"{directory}: no source {unknown[0]!r}; it has {', '.join(by_name)}")
    return [PreparedSource(directory, manifest, by_name[name]) for name in sources or by_name]
