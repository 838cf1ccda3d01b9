"""Multi-host start: detection from the environment, and real processes on this machine."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from olmax.distributed import Cluster, detect
from olmax.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[001-004]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "host0:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}


@pytest.mark.parametrize(
    ("environ", "tpu", "expected"),
    [
        ({}, False, None),
        (PLAIN, False, Cluster("environment", "host0:1234", 4, 3)),
        (PLAIN | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, False, None),
        (SLURM, False, Cluster("slurm")),
        (SLURM | PLAIN, False, Cluster("environment", "host0:1234", 4, 3)),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        # An interactive allocation without a step is one process.
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}, True, Cluster("gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, Cluster("gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
        ({}, True, Cluster("gcetpu")),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ],
)
def test_detection(environ, tpu, expected):
    assert detect(environ, tpu_attached=tpu) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "not JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "four"}, "must be integers"),
        ({"JAX_PROCESS_ID": "4"}, r"not in 0\.\.3"),
    ],
)
def test_incomplete_environment_is_an_error(change, message):
    with pytest.raises(UserError, match=message):
        detect(PLAIN | change)


WORKER = """
import json
from olmax import distributed
distributed.initialize()
import jax
import numpy as np
from olmax import sharding
from olmax.models import get_preset
import sys; sys.path.insert(0, "tests")
from sharding_test import CONFIG, TOKENS, loss_fn
mesh = sharding.make_mesh("fsdp=2,tensor=2")
model = sharding.init_decoder(CONFIG, mesh=mesh)
rows = np.asarray(TOKENS)
tokens = jax.make_array_from_callback(
    rows.shape, sharding.batch_sharding(mesh), lambda index: rows[index]
)
with sharding.use_mesh(mesh):
    loss = jax.jit(loss_fn)(model, tokens)
print(json.dumps({
    "process": jax.process_index(),
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "loss": float(loss),
}))
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("kind", ["environment", "slurm"])
def test_real_processes_agree_with_one(kind, repository):
    from sharding_test import CONFIG, TOKENS, loss_fn

    from olmax import sharding

    port = free_port()
    workers = []
    for index in range(2):
        if kind == "environment":
            environ = {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
        else:
            environ = {
                "SLURM_JOB_ID": "77",
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "JAX_COORDINATOR_PORT": str(port),
            }
        environ |= {"PYTHONPATH": "src:.", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER],
                cwd=repository,
                env=os.environ | environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    results = [json.loads(out.strip().splitlines()[-1]) for out, _ in outputs]
    assert [(r["process"], r["processes"], r["devices"]) for r in results] == [(0, 2, 4), (1, 2, 4)]
    expected = float(loss_fn(sharding.init_decoder(CONFIG), TOKENS))
    np.testing.assert_allclose([r["loss"] for r in results], expected, atol=1e-5)
