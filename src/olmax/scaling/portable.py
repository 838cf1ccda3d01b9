"""Arithmetic whose last bits are the same on every x86-64 CPU, for the published optimisers.

Some of the published fits stop in flat valleys, at a place that the last bits of the objective
choose, and there the printed digits depend on them. Two things differ between CPUs: numpy has an
exp, log and power of its own for AVX-512, and OpenBLAS, in which scipy's optimisers add up, has
kernels for every kind of CPU. Importing this module before scipy's BLAS is loaded pins the latter
for the whole process; afterwards it changes nothing, and fits in flat valleys may stop elsewhere.
"""

import os
from typing import Any

import numpy as np

_VARIABLE = "OPENBLAS_CORETYPE"
_before = os.environ.get(_VARIABLE)
if _before is None:
    # The oldest kernels that every x86-64 CPU of today runs; other architectures ignore the name.
    os.environ[_VARIABLE] = "Nehalem"
try:
    from scipy import optimize
finally:
    # OpenBLAS has read it; processes started from here choose for themselves.
    if _before is None:
        del os.environ[_VARIABLE]

__all__ = ["PORTABLE", "optimize"]


def _rounded(function, *arguments) -> np.ndarray:
    # A long double has eleven bits more (x86), so rounding its result gives the nearest double but
    # for about one argument in two thousand, and that one alike everywhere.
    return function(*(np.asarray(a, np.longdouble) for a in arguments)).astype(np.float64)


class _Portable:
    """numpy with exp, log and power rounded to nearest; float64 in and out, shapes as numpy's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def exp(self, x) -> np.ndarray:
        return _rounded(np.exp, x)

    def log(self, x) -> np.ndarray:
        return _rounded(np.log, x)

    def log1p(self, x) -> np.ndarray:
        return _rounded(np.log1p, x)

    def power(self, x, y) -> np.ndarray:
        return _rounded(np.power, x, y)


PORTABLE = _Portable()
