"""The training loader: a global order that depends on the seed alone, read by any number of hosts.

Example number i of a run is a function of (seed, i) and the data: Grain's random-access shuffle,
repeat and mix give it without reading what came before. The state of a run is therefore the number
of examples consumed; it can be resumed at any step, with another number of hosts or another batch
size, without losing or repeating an example.

Letters: B rows of this host's share of a batch, L tokens of an instance.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import numpy as np

from olmax.data.instances import InstanceSource
from olmax.data.packing import document_segments
from olmax.data.repetition import RepetitionFilter
from olmax.errors import UserError

STATE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How instances become batches.

    Attributes:
        batch_size: rows of a global batch, over all hosts.
        seed: of the order; the same seed gives the same order on any number of hosts.
        shuffle: shuffle globally, anew each epoch; else the stored order.
        epochs: passes over the data before the loader ends; None never ends. With weights it must
            be None.
        weights: share of the rows by source name (need not sum to 1), interleaved evenly (Grain
            rounds shares to 1% of the smallest); a source
            that runs out begins its next, reshuffled epoch. None takes every instance of every
            source once an epoch.
        document_masking: add `segment_ids` and `positions`, so that attention stays inside
            documents (OLMo 2: off).
        repetition_filter: rows it finds get a `loss_mask` of False throughout; None leaves it out.
        vocab_size: ids from here on are an error; None does not check.
        host_index: this host, from 0.
        host_count: hosts that share each global batch.
        prefetch: batches read ahead in a background thread; 0 reads in the caller's.
    """

    batch_size: int
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None
    weights: Mapping[str, float] | None = None
    document_masking: bool = False
    repetition_filter: RepetitionFilter | None = RepetitionFilter()
    vocab_size: int | None = None
    host_index: int = 0
    host_count: int = 1
    prefetch: int = 4


class DataLoader(Iterator[dict[str, np.ndarray]]):
    """Yields this host's rows of each global batch.

    A batch is a dict of `tokens` int32 [B, L], `loss_mask` bool [B, L], `source` int32 [B] (index
    into `source_names`) and, with document masking, `segment_ids` and `positions` int32 [B, L].
    Host h of n gets rows h*B to (h+1)*B of the global batch, B = batch_size / n. With `epochs`, the
    last batch is filled up with rows that repeat the last example under a `loss_mask` of False.

    The loader also is a context manager; `close` ends its thread.
    """

    def __init__(self, sources: Sequence[InstanceSource], options: LoaderOptions):
        """Plans the order; reading begins with the first batch.

        Raises:
            UserError: sources disagree on the sequence length or have the same name, unknown or
                negative weights, a batch that the hosts cannot share.
        """
        self.options = options
        self._sources = list(sources)
        _check(self._sources, options)
        self._order = _order(self._sources, options)
        self._rows = options.batch_size // options.host_count
        self._examples = 0
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: collections.deque[concurrent.futures.Future] = collections.deque()

    @property
    def source_names(self) -> list[str]:
        """Names that `source` of a batch indexes."""
        return [source.name for source in self._sources]

    @property
    def sequence_length(self) -> int:
        """Tokens of an instance, L."""
        return self._sources[0].sequence_length

    @property
    def instances(self) -> int:
        """Instances of all sources: examples of one epoch when there are no weights."""
        return sum(len(source) for source in self._sources)

    @property
    def examples(self) -> int:
        """Examples consumed so far, over all hosts."""
        return self._examples

    @property
    def fingerprint(self) -> str:
        """Of everything that fixes the order: the data, the weights, the shuffle and the seed."""
        o = self.options
        plan = {
            "data": self._data_fingerprint(),
            "weights": None if o.weights is None else sorted(o.weights.items()),
            "shuffle": o.shuffle,
            "seed": o.seed,
        }
        return hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]

    def __iter__(self) -> DataLoader:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch of this host.

        Raises:
            StopIteration: after `epochs`.
            UserError: a record is damaged or a token id is out of range; says shard and record.
        """
        if self.options.prefetch == 0:
            batch = self._read_batch(self._examples)
        else:
            if self._executor is None:
                # One thread keeps the order of reads, and so of errors, fixed.
                self._executor = concurrent.futures.ThreadPoolExecutor(1, "olmax-loader")
            while len(self._pending) < self.options.prefetch:
                first = self._examples + len(self._pending) * self.options.batch_size
                self._pending.append(self._executor.submit(self._read_batch, first))
            try:
                batch = self._pending.popleft().result()
            except BaseException:
                # Those read ahead come after the one that failed and must not take its place.
                self._drop_pending()
                raise
        if batch is None:
            raise StopIteration
        self._examples += self.options.batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the run is after the last batch returned; JSON-able, equal on all hosts."""
        return {
            "version": STATE_VERSION,
            "examples": self._examples,
            "seed": self.options.seed,
            "data": self._data_fingerprint(),
            "fingerprint": self.fingerprint,
        }

    def set_state(self, state: Mapping[str, Any], *, allow_changed_data: bool = False) -> None:
        """Continues after the state's last batch, whatever the hosts and the batch size were.

        Args:
            state: from `get_state`.
            allow_changed_data: continue at the same count although data, weights or seed differ
                (the order is then another one: examples may be seen twice or never).

        Raises:
            UserError: the state belongs to other data, weights or seed, or is none.
        """
        try:
            version, examples = state["version"], int(state["examples"])
            known = state["seed"], state["data"], state["fingerprint"]
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"loader state: {e!r} is missing or wrong; it is not a state of this loader"
            ) from e
        if version != STATE_VERSION:
            raise UserError(f"loader state: version {version}, this program reads {STATE_VERSION}")
        if not allow_changed_data and known[2] != self.fingerprint:
            if known[1] != self._data_fingerprint():
                what = f"data {known[1]}, now {self._data_fingerprint()}"
            elif known[0] != self.options.seed:
                what = f"seed {known[0]}, now {self.options.seed}"
            else:
                what = "other weights or shuffling"
            raise UserError(
                f"loader state was saved with {what}: the order differs; restore the old settings, "
                "or allow changed data"
            )
        self._drop_pending()
        self._examples = examples

    def close(self) -> None:
        """Ends the background thread; the loader may be used again afterwards."""
        self._drop_pending()
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            self._executor = None

    def __enter__(self) -> DataLoader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _drop_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()

    def _data_fingerprint(self) -> str:
        parts = [[s.name, s.fingerprint, s.sequence_length, len(s)] for s in self._sources]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _read_batch(self, first: int) -> dict[str, np.ndarray] | None:
        """This host's rows of the global batch that begins at `first`; None after the end."""
        options = self.options
        total = None if options.epochs is None else options.epochs * self.instances
        if total is not None and first >= total:
            return None
        start = first + options.host_index * self._rows
        numbers = range(start, start + self._rows)
        real = self._rows if total is None else min(max(total - start, 0), self._rows)
        places = [self._order[i if total is None else min(i, total - 1)] for i in numbers]

        tokens_BL = np.empty((self._rows, self.sequence_length), np.int32)
        source_B = np.array([source for source, _ in places], np.int32)
        for k, source in enumerate(self._sources):
            rows = np.flatnonzero(source_B == k)
            if len(rows):
                indices = [places[row][1] for row in rows]
                stored_BL = source.read(indices)
                self._check_ids(source, indices, stored_BL)
                tokens_BL[rows] = stored_BL

        loss_mask_BL = np.ones(tokens_BL.shape, bool)
        loss_mask_BL[real:] = False
        if options.repetition_filter is not None:
            loss_mask_BL[options.repetition_filter.repeats(tokens_BL)] = False
        batch = {"tokens": tokens_BL, "loss_mask": loss_mask_BL, "source": source_B}
        if options.document_masking:
            batch["segment_ids"], batch["positions"] = document_segments(
                tokens_BL, self._sources[0].eos_id
            )
        return batch

    def _check_ids(
        self, source: InstanceSource, indices: Sequence[int], tokens_BL: np.ndarray
    ) -> None:
        limit = self.options.vocab_size
        if limit is None or int(tokens_BL.max()) < limit:
            return
        row, column = np.argwhere(tokens_BL >= limit)[0]
        raise UserError(
            f"{source.locate(indices[row])}: token id {tokens_BL[row, column]} at position "
            f"{column} is outside the "
            f"vocabulary of {limit}; the data was made with another tokenizer"
        )


def _check(sources: list[InstanceSource], options: LoaderOptions) -> None:
    if not sources:
        raise UserError("the loader was given no data sources")
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise UserError(f"data sources must have different names, got {', '.join(names)}")
    lengths = {source.sequence_length for source in sources}
    if len(lengths) > 1:
        listed = ", ".join(f"{s.name} {s.sequence_length}" for s in sources)
        raise UserError(f"data sources differ in sequence length ({listed}); prepare them alike")
    if options.document_masking and len({source.eos_id for source in sources}) > 1:
        raise UserError(
            "data sources differ in their end-of-text id; prepare them with one tokenizer"
        )
    if options.batch_size < 1 or options.batch_size % options.host_count:
        raise UserError(
            f"batch size {options.batch_size} cannot be shared by {options.host_count} hosts; give "
            "a multiple"
        )
    if not 0 <= options.host_index < options.host_count:
        raise UserError(f"host index {options.host_index} is not among {options.host_count} hosts")
    if options.weights is not None:
        missing = [name for name in options.weights if name not in names]
        if missing:
            raise UserError(
                f"weights name {missing[0]!r}, which is not a source; there are {', '.join(names)}"
            )
        bad = [name for name in names if not options.weights.get(name, 0) > 0]
        if bad:
            raise UserError(
                f"source {bad[0]!r} has no positive weight; give it one or leave the source out"
            )
        if options.epochs is not None:
            raise UserError(
                "epochs are not defined for a weighted mixture; leave epochs or the weights out"
            )


def _order(sources: list[InstanceSource], options: LoaderOptions) -> Any:
    """Random-access sequence: example number -> (source, index in the source)."""

    def shuffled(dataset: Any, stream: int) -> Any:
        if options.shuffle:
            # Grain numbers epochs by adding to the seed, so nearby seeds would share orders;
            # hashing parts them.
            seed = np.random.SeedSequence([options.seed, stream]).generate_state(1)[0]
            dataset = dataset.shuffle(seed=int(seed))
        return dataset.repeat()

    if options.weights is None:
        ends = np.cumsum([len(source) for source in sources])

        def place(index: int) -> tuple[int, int]:
            source = int(np.searchsorted(ends, index, side="right"))
            return source, index - (int(ends[source - 1]) if source else 0)

        return shuffled(grain.MapDataset.range(int(ends[-1])).map(place), 0)

    def named(k: int, size: int) -> Any:
        return shuffled(grain.MapDataset.range(size).map(lambda index: (k, index)), k)

    return grain.MapDataset.mix(
        [named(k, len(source)) for k, source in enumerate(sources)],
        weights=[options.weights[source.name] for source in sources],
    )
