"""What flows into preparation: documents, and sources that can be read again and again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus.

    Attributes:
        text: its text; empty when `tokens` is given.
        id: a name that is stable between runs, for messages and splits.
        source: the name of the source it belongs to.
        tokens: already tokenised content (for example from a seqio Task); replaces `text`.
    """

    text: str
    id: str
    source: str
    tokens: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class DocumentSource:
    """A named, re-readable sequence of documents.

    Attributes:
        name: one word; becomes the name of a source in mixtures and metrics.
        fingerprint: changes whenever the documents change; preparation compares it to reuse its
            results.
        read: starts reading from the first document, in a fixed order.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterable[Document]]
