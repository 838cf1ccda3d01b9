"""A tokenizer as a seqio vocabulary. Importing this imports seqio and tensorflow (seconds)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from etils import epath

from olmax.data.tokenizer import Tokenizer


class TokenizerVocabulary(seqio.Vocabulary):
    """`Tokenizer` behind seqio's interface; nothing is added, decoding ends at end of text."""

    def __init__(self, tokenizer: Tokenizer | epath.PathLike):
        """Wraps a tokenizer, or the one in a tokenizer.json (file or directory)."""
        super().__init__(extra_ids=0)
        self.tokenizer = (
            tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.from_file(tokenizer)
        )

    @property
    def eos_id(self) -> int:
        """End-of-text id."""
        return self.tokenizer.eos_id

    @property
    def pad_id(self) -> int:
        """Padding id (not 0, as seqio's own vocabularies have it)."""
        return self.tokenizer.pad_id

    @property
    def unk_id(self) -> None:
        """None: byte-level tokenizers know every text."""
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(text: Any) -> np.ndarray:
            # Eagerly the string comes in a 0-d array, inside a graph bare.
            raw: bytes = text.item() if isinstance(text, np.ndarray) else text
            return np.asarray(self.tokenizer.encode(raw.decode("utf-8")), np.int32)

        ids = tf.numpy_function(encode, [s], tf.int32, stateful=False)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            flat = rows.reshape(-1, rows.shape[-1])
            # seqio has put padding after the end of text; it is no part of the text.
            texts = [self.tokenizer.decode(row[row != self.pad_id]).encode("utf-8") for row in flat]
            return np.array(texts, dtype=object).reshape(rows.shape[:-1])

        text = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        text.set_shape(ids.shape[:-1])
        return text

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TokenizerVocabulary)
            and self.tokenizer.fingerprint == other.tokenizer.fingerprint
            and (self.eos_id, self.pad_id) == (other.eos_id, other.pad_id)
        )

    def __hash__(self) -> int:
        return hash((self.tokenizer.fingerprint, self.eos_id, self.pad_id))

    def __str__(self) -> str:
        return f"TokenizerVocabulary({self.tokenizer.fingerprint}, size={self.vocab_size})"
