"""Rows of forward passes that score continuations: what shares a row, and which shapes rows get.

Continuations of one context share a row: the context once, then every continuation as a branch that
sees the context and itself. For a multiple-choice question that is a third of the tokens or less.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from olmax.errors import UserError
from olmax.generation.batching import as_ids, length_bucket
from olmax.models.config import DecoderConfig

CONTEXT_SUBSEGMENT = 2**30
"""Every branch sees the tokens of this subsegment (see `Row.subsegment_ids_L`)."""

_COMPILE_FLOPS = {"cpu": 2e11}
_COMPILE_FLOPS_ELSEWHERE = 1e15
"""FLOPs that a device does while a shape is compiled, some seconds; to the order of magnitude."""


@dataclasses.dataclass
class Row:
    """A context and the continuations that follow it, all but the last token of each."""

    context_L: np.ndarray
    branches: list[np.ndarray] = dataclasses.field(default_factory=list)
    """Whole continuations."""
    pairs: list[int] = dataclasses.field(default_factory=list)
    """Whose they are."""

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.context_L) + sum(len(branch) - 1 for branch in self.branches)

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return sum(map(len, self.branches))

    @property
    def branched(self) -> bool:
        """Whether some tokens may not see others before them."""
        return sum(len(branch) > 1 for branch in self.branches) > 1

    def tokens_L(self) -> np.ndarray:
        """What the model reads."""
        return np.concatenate([self.context_L, *(branch[:-1] for branch in self.branches)])

    def positions_L(self) -> np.ndarray:
        """RoPE positions: every branch goes on where the context ends."""
        start = len(self.context_L)
        branches = (np.arange(start, start + len(branch) - 1) for branch in self.branches)
        return np.concatenate([np.arange(start), *branches])

    def subsegment_ids_L(self) -> np.ndarray:
        """A token sees those before it whose id is at least its own: the context, its branch."""
        lengths = [len(self.context_L), *(len(branch) - 1 for branch in self.branches)]
        ids = [CONTEXT_SUBSEGMENT, *range(1, len(lengths))]
        return np.repeat(np.array(ids, np.int32), lengths)

    def predicting_T(self) -> np.ndarray:
        """Places in the row that predict the scored tokens, branch after branch."""
        context = len(self.context_L)
        places, start = [], context
        for branch in self.branches:
            places += [context - 1, *range(start, start + len(branch) - 1)]
            start += len(branch) - 1
        return np.array(places, np.int32)


class Shape(NamedTuple):
    """Padded sizes of a row."""

    branched: bool
    length: int
    scored: int


def windows(
    context: np.ndarray, continuation: np.ndarray, max_len: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(context, targets) pieces that together score every token of the continuation once.

    A piece has at most `stride` targets, and as much before them as lets the model read at most
    `max_len` tokens. The context is not empty.
    """
    tokens = np.concatenate([context, continuation])
    for start in range(len(context), len(tokens), stride):
        stop = min(start + stride, len(tokens))
        yield tokens[max(0, stop - 1 - max_len) : start], tokens[start:stop]


def make_rows(
    config: DecoderConfig,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    names: Sequence[str],
    *,
    stride: int,
    prefix_id: int | None,
    share_contexts: bool,
) -> tuple[list[Row], list[int]]:
    """Rows of at most `max_seq_len` tokens, and the length of every pair's continuation.

    Raises:
      UserError: see `scoring.score`.
    """
    if config.moe is not None and config.moe.routing == "expert_choice":
        # Experts that choose among the tokens of a row would choose among all branches.
        share_contexts = False
    limit = config.max_seq_len
    rows: list[Row] = []
    open_rows: dict[bytes, Row] = {}
    lengths = []
    for number, (context, continuation) in enumerate(pairs):
        where = names[number]
        context_ids = as_ids(context, config, f"{where}, context")
        continuation_ids = as_ids(continuation, config, f"{where}, continuation")
        if not continuation_ids.size:
            raise UserError(f"{where}: the continuation is empty; there is nothing to score")
        if not context_ids.size:
            if prefix_id is None:
                raise UserError(
                    f"{where}: the context is empty; give prefix_id, the token that stands for it"
                )
            context_ids = as_ids([prefix_id], config, "prefix_id")
        lengths.append(len(continuation_ids))
        for context_L, targets in windows(context_ids, continuation_ids, limit, stride):
            # Contexts themselves would double what the rows take.
            key = hashlib.blake2b(context_L.tobytes(), digest_size=16).digest()
            row = open_rows.get(key) if share_contexts else None
            if (
                row is None
                or row.length + len(targets) - 1 > limit
                or row.scored + len(targets) > limit
            ):
                row = open_rows[key] = Row(context_L)
                rows.append(row)
            row.branches.append(targets)
            row.pairs.append(number)
    return rows, lengths


def group(
    rows: list[Row], config: DecoderConfig, mesh: Mesh | None
) -> list[tuple[Shape, list[Row]]]:
    """Rows by the shape they are padded to, the shortest first.

    Every shape is compiled; shapes are joined where the padding costs less than that.
    """
    exact: dict[Shape, list[Row]] = collections.defaultdict(list)
    for row in rows:
        scored = 1 << max(2, (row.scored - 1).bit_length())
        exact[Shape(row.branched, length_bucket(row.length, config, mesh), scored)].append(row)
    groups = []
    for branched in (False, True):
        shapes = sorted(shape for shape in exact if shape.branched == branched)
        for first, last in _segments(shapes, exact, config):
            joined = Shape(*map(max, *shapes[first:last], shapes[first]))
            groups.append((joined, [row for shape in shapes[first:last] for row in exact[shape]]))
    return sorted(groups, key=lambda group: group[0][1:])


def _segments(shapes: list[Shape], members, config: DecoderConfig) -> list[tuple[int, int]]:
    """Cuts a sorted list of shapes so that compiling and computing together cost least."""
    head = config.vocab_size * config.d_model
    parameters = config.num_active_params
    platform = jax.default_backend()
    # All in tokens of a forward pass.
    compiling = _COMPILE_FLOPS.get(platform, _COMPILE_FLOPS_ELSEWHERE) / (2 * parameters)
    costs, starts = [0.0], []
    for last in range(1, len(shapes) + 1):
        options = []
        count, length, scored = 0, 0, 0
        for first in range(last - 1, -1, -1):
            count += len(members[shapes[first]])
            length = max(length, shapes[first].length)
            scored = max(scored, shapes[first].scored)
            padded = count * (length + scored * head / parameters)
            options.append((costs[first] + compiling + padded, first))
        cost, start = min(options)
        costs.append(cost)
        starts.append(start)
    found, last = [], len(shapes)
    while last:
        found.append((starts[last - 1], last))
        last = starts[last - 1]
    return found[::-1]
