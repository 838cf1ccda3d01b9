"""Memory: one copy of the model and no more than 1.3 of its largest tensors, in and out."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from olmax.interop.save import DTYPES, write_huggingface
from olmax.models import DecoderConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc"),
]

CONFIG = DecoderConfig(
    d_model=1024, n_layers=6, n_heads=16, n_kv_heads=4, head_dim=64, d_ff=4096, vocab_size=32768
)
LARGEST = CONFIG.vocab_size * CONFIG.d_model

_PREAMBLE = """
import json, resource, sys
import jax, numpy as np
from olmax import interop, merging
from olmax.interop.save import save_huggingface

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def begin():
    # Resets the peak to what is resident now.
    open("/proc/self/clear_refs", "w").write("5")
    return resident("VmRSS")

small, source, output, dtype = sys.argv[1:]
"""

_LOAD = """
interop.load_model(small, param_dtype=dtype)
before = begin()
model = interop.load_model(source, param_dtype=dtype)
jax.block_until_ready(model.head.kernel[...])
print(json.dumps(resident("VmHWM") - before))
"""

_SAVE = """
save_huggingface(interop.load_model(small, param_dtype=dtype), output + "-small")
model = interop.load_model(source, param_dtype=dtype)
before = begin()
save_huggingface(model, output)
print(json.dumps(resident("VmHWM") - before))
"""

_SOUP = """
merging.soup([small, small], output + "-small")
before = begin()
merging.soup([source, source, source], output)
print(json.dumps(resident("VmHWM") - before))
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def big(request, tmp_path_factory):
    """(directory of a checkpoint of 200 million random parameters, its dtype)."""
    directory = tmp_path_factory.mktemp("big") / "model"
    random = np.random.default_rng(0)

    def tensor(name, pieces):
        from olmax.interop import layout

        shape = layout.tensor_shape(pieces, CONFIG)
        return random.standard_normal(shape, np.float32).astype(DTYPES[request.param][1])

    write_huggingface(directory, CONFIG, tensor, dtype=request.param)
    return directory, request.param


def growth(script, checkpoints, source, output, dtype):
    """Bytes by which the peak exceeds what was resident before."""
    run = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + script, checkpoints["olmo2_gqa"], source, output, dtype],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"},
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading(tmp_path, checkpoints, big, dtype):
    directory, stored = big
    itemsize = DTYPES[dtype][1].itemsize
    got = growth(_LOAD, checkpoints, directory, tmp_path / "out", dtype)
    model, largest = CONFIG.num_params * itemsize, LARGEST * itemsize
    print(f"{stored} -> {dtype}: model {model / 1e6:.0f} MB, largest tensor {largest / 1e6:.0f} MB,"
          f" peak {got / 1e6:.0f} MB")  # fmt: skip
    assert got <= model + 1.3 * largest


def test_saving(tmp_path, checkpoints, big):
    directory, stored = big
    got = growth(_SAVE, checkpoints, directory, tmp_path / "out", stored)
    largest = LARGEST * DTYPES[stored][1].itemsize
    print(f"export in {stored}: largest tensor {largest / 1e6:.0f} MB, growth {got / 1e6:.0f} MB")
    assert got <= 3 * largest


def test_soup(tmp_path, checkpoints, big):
    directory, stored = big
    got = growth(_SOUP, checkpoints, directory, tmp_path / "out", stored)
    print(f"soup of {stored}: largest {LARGEST * 4 / 1e6:.0f} MB, growth {got / 1e6:.0f} MB")
    # The merged tensor in float32, its cast, and blocks.
    assert got <= 2.5 * LARGEST * 4
