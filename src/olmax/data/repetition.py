"""The instance filter of OLMo 2: instances with a long back-to-back repetition take no part in the
loss.

Paper: section 3.1 ("repeated n-grams"); in the released configurations `instance_filter` with
    periods 1 to 13 and count 32.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class RepetitionFilter:
    """Finds instances in which an n-gram repeats back to back.

    Attributes:
        min_period: shortest n-gram, in tokens.
        max_period: longest n-gram, in tokens.
        max_count: this many occurrences in a row, wherever they begin, mark the instance.
    """

    min_period: int = 1
    max_period: int = 13
    max_count: int = 32

    def __post_init__(self):
        if not 1 <= self.min_period <= self.max_period or self.max_count < 2:
            raise ValueError(f"no such repetition filter: {self}")

    def repeats(self, tokens_BL: np.ndarray) -> np.ndarray:
        """Whether each instance holds such a repetition, bool [B]."""
        found_B = np.zeros(len(tokens_BL), bool)
        for period in range(self.min_period, self.max_period + 1):
            # c occurrences of an n-gram of p tokens in a row are (c - 1) * p tokens in a row that
            # equal the one p later.
            run = (self.max_count - 1) * period
            if run + period > tokens_BL.shape[1]:
                break
            equal_BL = tokens_BL[:, period:] == tokens_BL[:, :-period]
            # A run covers one of every `run` places. Looking there first spares almost all rows the
            # sums.
            rows = np.flatnonzero(equal_BL[:, run - 1 :: run].any(axis=1) & ~found_B)
            if len(rows):
                sums = np.cumsum(equal_BL[rows], axis=1, dtype=np.int32)
                window = sums[:, run - 1 :].copy()
                window[:, 1:] -= sums[:, :-run]
                found_B[rows] = (window == run).any(axis=1)
        return found_B
