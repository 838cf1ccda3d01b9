"""Commands are quiet where libtpu is installed and no TPU is, and leave real TPUs alone."""

import importlib.util
import os
import subprocess
import sys

import pytest

from olmax import absent_tpu, cpu_tuning


@pytest.fixture
def bare(monkeypatch):
    """An environment in which nothing is said about TPUs."""
    for name in absent_tpu.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return monkeypatch


def test_what_is_set_is_kept(bare):
    bare.setattr(absent_tpu, "attached", lambda: False)
    bare.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    cpu_tuning.apply()
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "a,b"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_a_real_tpu_is_told_nothing(bare):
    bare.setattr(absent_tpu, "attached", lambda: True)
    cpu_tuning.apply()
    assert not set(absent_tpu.ENVIRONMENT) & set(os.environ)


@pytest.mark.skipif(absent_tpu.attached(), reason="this machine has a TPU")
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'olmax[tpu]')",
)
def test_jax_starts_without_a_word():
    code = "from olmax import cpu_tuning; cpu_tuning.apply(); import jax; print(jax.devices())"
    env = {k: v for k, v in os.environ.items() if k not in {*absent_tpu.ENVIRONMENT}}
    env.pop("JAX_PLATFORMS", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "CpuDevice" in done.stdout
    assert done.stderr == ""
