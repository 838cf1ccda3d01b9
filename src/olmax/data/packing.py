"""Documents to fixed-length instances: concatenate, chunk, and mark the documents inside a chunk.

Letters: B instances, L tokens of an instance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def chunk(
    documents: Iterable[Sequence[int]], *, sequence_length: int, eos_id: int, dtype: str = "uint32"
) -> Iterator[np.ndarray]:
    """Concatenates documents, one end-of-text token after each, and cuts the stream into instances.

    Documents straddle instances and nothing is padded; what is left at the end (fewer than
    `sequence_length` tokens) is dropped, as in OLMo's data format, where this happens at the end of
    each file. A document that already ends in `eos_id` gets no second one.

    Args:
        documents: token ids of each document.
        sequence_length: L.
        eos_id: the end-of-text token.
        dtype: unsigned integer type of the instances.

    Yields:
        Arrays [L] of `dtype`.
    """
    # An array filled in place rather than a growing list: a long document costs one copy.
    instance = np.empty(sequence_length, dtype)
    filled = 0
    for document in documents:
        tokens = np.asarray(document, dtype)
        if not len(tokens) or tokens[-1] != eos_id:
            tokens = np.append(tokens, np.asarray(eos_id, dtype))
        start = 0
        while start < len(tokens):
            step = min(len(tokens) - start, sequence_length - filled)
            instance[filled : filled + step] = tokens[start : start + step]
            filled += step
            start += step
            if filled == sequence_length:
                yield instance
                instance = np.empty(sequence_length, dtype)
                filled = 0


def document_segments(tokens_BL: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Marks the documents inside packed instances, for attention that stays inside a document.

    An end-of-text token is the last token of its document. The first document of an instance may be
    the tail of one that began in another instance; its positions start at 0 all the same.

    Returns:
        segment_ids int32 [B, L], counting from 1 in each row, and positions int32 [B, L], counting
        from 0 in each document.
    """
    starts_BL = np.zeros(tokens_BL.shape, bool)
    starts_BL[:, 1:] = tokens_BL[:, :-1] == eos_id
    segment_ids_BL = 1 + np.cumsum(starts_BL, axis=1, dtype=np.int32)
    index_L = np.arange(tokens_BL.shape[1], dtype=np.int32)
    start_BL = np.maximum.accumulate(np.where(starts_BL, index_L, 0), axis=1)
    return segment_ids_BL, (index_L - start_BL).astype(np.int32)


def document_spans(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Start and end of each document in a flat token stream, int64 [documents, 2].

    The end-of-text token belongs to the document it ends; an unfinished last document counts.
    """
    ends = np.flatnonzero(tokens == eos_id) + 1
    if len(tokens) and (not len(ends) or ends[-1] != len(tokens)):
        ends = np.append(ends, len(tokens))
    starts = np.concatenate([[0], ends])[: len(ends)]
    return np.stack([starts, ends], axis=1).astype(np.int64)
