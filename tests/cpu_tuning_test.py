"""The settings reach JAX, leave the user's own alone, and repair what they are there to repair."""

import os
import subprocess
import sys

import pytest

from olmax import cpu_tuning


def python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def no_allocator_change(monkeypatch):
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda: False)


def test_flags_that_the_user_set_are_kept(monkeypatch, no_allocator_change):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256 --xla_dump_to=/nowhere")
    cpu_tuning.apply()
    cpu_tuning.apply()
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_cpu_prefer_vector_width=256",
        "--xla_dump_to=/nowhere",
        "--xla_cpu_experimental_ynn_fusion_type=individual_dot",
    ]


def test_a_jaxlib_whose_flags_are_unknown_gets_none(monkeypatch, no_allocator_change):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cpu_tuning.importlib.metadata, "version", lambda name: "0.11.2")
    cpu_tuning.apply()
    assert os.environ["XLA_FLAGS"] == ""


SUM_OF_PRODUCTS = """
import olmax
from olmax.errors import UserError
try:
    olmax.load("nothing-is-here")
except UserError:
    pass
import jax, jax.numpy as jnp
E_BIJ = jax.random.normal(jax.random.key(0), (5, 60, 60))
def fn(E, c):
    return jnp.sum(E * (E @ jnp.broadcast_to(c, E.shape)))
with jax.disable_jit():
    expected = fn(E_BIJ, 1.7)
print(float(abs(jax.jit(fn)(E_BIJ, 1.7) / expected - 1)))
"""


def test_after_load_products_with_a_broadcast_operand_are_summed_right():
    assert float(python(SUM_OF_PRODUCTS, JAX_PLATFORMS="cpu")) < 1e-4


PAGES = """
import resource
from olmax import cpu_tuning
kept = cpu_tuning.keep_freed_memory()
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**26, np.uint8)
before = faults()
np.ones(2**26, np.uint8)
print(int(kept), faults() - before)
"""


def test_freed_memory_is_used_again():
    kept, faults = map(int, python(PAGES).split())
    if not kept:
        pytest.skip("not glibc")
    # 64 MiB are 16384 pages.
    assert faults < 1000


def test_accelerators_keep_their_allocator(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(cpu_tuning.absent_tpu, "attached", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    cpu_tuning.apply()
    assert not calls
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    cpu_tuning.apply()
    assert not calls
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cpu_tuning.apply()
    assert calls
