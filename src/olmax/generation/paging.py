"""Which pages of the cache a row gets, and which prompts are read together."""

from collections.abc import Sequence

import numpy as np

from olmax.generation.batching import bucket

PAGE = 64
"""Tokens of a page: a row wastes half a page on average, and a kernel starts a copy for each."""

SPARED_TOKENS = 1024
"""Tokens of padding that are worth a program of another shape."""


def page_table(tokens: Sequence[int], shards: int) -> tuple[np.ndarray, int]:
    """Pages for rows of up to `tokens` tokens each.

    Args:
      tokens: of every row, prompt and new ones; 0 for a row that only fills the batch.
      shards: devices that the rows are cut over, in equal parts. Each has pages of its own.

    Returns:
      int32 [B, T], numbers counted from the first page of the row's device and one beyond all pages
      where the row has none; and the number of pages of all devices together.
    """
    needed = [-(-count // PAGE) for count in tokens]
    rows = len(needed) // shards
    parts = [needed[start : start + rows] for start in range(0, len(needed), rows)]
    pages = shards * bucket(max(1, *(sum(part) for part in parts)))
    table = np.full((len(needed), bucket(max(1, *needed))), pages, np.int32)
    for shard, part in enumerate(parts):
        used = 0
        for row, count in enumerate(part):
            table[shard * rows + row, :count] = np.arange(used, used + count)
            used += count
    return table, pages


def prompt_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Rows whose prompts are read together, longest first: a row is with those of at most twice its
    length unless a group of its own spares little.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    longest = 0
    for at, row in enumerate(order):
        left = len(order) - at
        spared = left * (longest - bucket(lengths[row], minimum=16))
        if not groups or (2 * lengths[row] < longest and spared >= SPARED_TOKENS):
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return groups
