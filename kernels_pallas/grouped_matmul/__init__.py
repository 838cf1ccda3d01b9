"""Products of sorted rows with one matrix per group, as in dropless mixtures of experts."""

from kernels_pallas.grouped_matmul import words
from kernels_pallas.grouped_matmul.api import (
    IMPLEMENTATIONS,
    PER_DEVICE,
    choose,
    grouped_matmul,
    grouped_swiglu,
)
from kernels_pallas.grouped_matmul.rows import take_rows

__all__ = [
    "IMPLEMENTATIONS",
    "PER_DEVICE",
    "choose",
    "grouped_matmul",
    "grouped_swiglu",
    "take_rows",
    "words",
]
