"""One process a run directory."""

import os
import subprocess
import sys

import pytest

from olmax.errors import UserError
from olmax.training.run_directory import locked

HOLD = """
import sys
from olmax.training.run_directory import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_dies(tmp_path, repository):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(repository / "src")},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"is being written by process {holder.pid} on "):
        locked(tmp_path).__enter__()
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / "run.lock").read_text()


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write run directory"):
        locked(tmp_path / "file" / "run").__enter__()
