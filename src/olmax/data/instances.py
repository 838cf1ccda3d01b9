"""What the training loader reads: random access to token instances, wherever they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class InstanceSource(Protocol):
    """Instances of one source, all of the same length.

    Attributes:
        name: name of the source in mixtures and metrics.
        sequence_length: tokens of an instance.
        eos_id: end-of-text token that separates documents.
        fingerprint: changes with the tokens or their order.
    """

    name: str
    sequence_length: int
    eos_id: int
    fingerprint: str

    def __len__(self) -> int:
        """Number of instances."""
        ...

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The instances at `indices`, in that order: unsigned integers [B, L]."""
        ...

    def locate(self, index: int) -> str:
        """File and record of an instance, for messages."""
        ...
