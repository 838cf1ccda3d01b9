"""Real processes on this machine."""

import io
import sys
import textwrap

from olmax.launching import local
from olmax.launching.job import Job


def job(code: str, *arguments: str, **kwargs) -> Job:
    return Job("rehearsal", (sys.executable, "-c", textwrap.dedent(code), *arguments), **kwargs)


def test_every_process_knows_its_place():
    code = "import os; print(os.environ['JAX_PROCESS_ID'], os.environ['JAX_NUM_PROCESSES'])"
    out = io.StringIO()
    assert local.run(job(code, environment={"X": "1"}), 3, out=out) == 0
    assert sorted(out.getvalue().splitlines()) == ["[0] 0 3", "[1] 1 3", "[2] 2 3"]


def test_one_failure_stops_the_others_and_restarts_all(tmp_path):
    # On the first attempt process 0 fails once process 1 is there, which would run for a minute.
    code = """
        import os, pathlib, sys, time
        failed, running = (pathlib.Path(sys.argv[1]) / name for name in ("failed", "running"))
        if failed.exists():
            print("second attempt")
        elif os.environ["JAX_PROCESS_ID"] == "1":
            running.touch()
            time.sleep(60)
        else:
            while not running.exists():
                time.sleep(0.01)
            failed.touch()
            sys.exit(7)
    """
    out = io.StringIO()
    assert local.run(job(code, str(tmp_path), max_restarts=1), 2, out=out) == 0
    assert "[launch] status 7; restart 1" in out.getvalue()
    assert out.getvalue().count("second attempt") == 2


def test_the_status_of_the_failure_comes_back_when_restarts_are_used_up():
    assert local.run(job("raise SystemExit(3)", max_restarts=0), 1, out=io.StringIO()) == 3


def test_processes_form_one_jax_job():
    code = """
        from olmax import distributed
        distributed.initialize()
        import jax
        from jax.experimental import multihost_utils
        total = multihost_utils.process_allgather(jax.numpy.ones(()) * (jax.process_index() + 1))
        print("sum", float(total.sum()), "devices", jax.device_count())
    """
    out = io.StringIO()
    assert local.run(job(code, max_restarts=0), 2, out=out) == 0, out.getvalue()
    assert out.getvalue().count("sum 3.0 devices 2") == 2
