"""Settings of the CPU backend."""

import os
import subprocess
import sys

from olmax import cpu_tuning


def test_flags_of_the_user_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256 --xla_dump_to=x")
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda: False)
    cpu_tuning.apply()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[:2] == ["--xla_cpu_prefer_vector_width=256", "--xla_dump_to=x"]
    assert flags[2:] == ["--xla_cpu_experimental_ynn_fusion_type=individual_dot"]


def test_an_unknown_jaxlib_gets_no_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(cpu_tuning, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(cpu_tuning.importlib.metadata, "version", lambda name: "0.11.2")
    cpu_tuning.apply()
    assert os.environ["XLA_FLAGS"] == ""


def test_jax_takes_the_flags(repository):
    code = (
        "from olmax import cpu_tuning; cpu_tuning.apply();"
        "import jax.numpy as jnp; print(float(jnp.ones((3, 4)).sum()))"
    )
    environ = {"PYTHONPATH": "src:.", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert result.stdout.strip() == "12.0"
