"""The same last bits on every CPU."""

import decimal
import subprocess
import sys

import numpy as np
import pytest

from olmax.scaling.portable import PORTABLE


@pytest.mark.parametrize("name", ["exp", "log", "log1p", "power"])
def test_results_are_the_nearest_doubles(name):
    x = np.random.default_rng(3).uniform(0.01, 30.0, 400)
    arguments = (x, np.float64(-0.25)) if name == "power" else (x,)
    exact = {
        "exp": lambda v: v.exp(),
        "log": lambda v: v.ln(),
        "log1p": lambda v: (1 + v).ln(),
        "power": lambda v: v ** decimal.Decimal("-0.25"),
    }[name]
    with decimal.localcontext(prec=50):
        wanted = [float(exact(decimal.Decimal(float(v)))) for v in x]
    ours = getattr(PORTABLE, name)(*arguments)
    assert ours.dtype == np.float64
    np.testing.assert_array_equal(ours, wanted)


def test_it_leaves_the_environment_as_it_was():
    code = "import os, olmax.scaling.portable; print(os.environ.get('OPENBLAS_CORETYPE'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["None"]
