"""Runs as a user meets them: resumed, killed, stopped, refused, broken."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.models import Decoder
from olmax.training import checkpoint_files
from olmax.training.checkpoint_files import read_metadata, valid_checkpoints
from olmax.training.config import CheckpointConfig
from olmax.training.metrics import Mean
from olmax.training.names import named_leaves
from olmax.training.recorder import read_metrics
from olmax.training.signals import Stopped
from olmax.training.trainer import Trainer
from tests.training import tiny_training
from tests.training.tiny_training import CONFIG, CountingLoader, one_device, trainer


def params(model):
    return {name: np.asarray(x) for name, x in named_leaves(nnx.state(model)).items()}


def rows(directory):
    """Metrics without what depends on the clock."""
    clock = ("tokens_per_second", "mfu")
    return [
        {name: value for name, value in row.items() if name not in clock}
        for row in read_metrics(directory)
    ]


def checkpoints(directory):
    root = checkpoint_files.epath.Path(directory / "checkpoints")
    return [int(path.name) for path in valid_checkpoints(root)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, trainer(directory).fit()


class StopAfter(CountingLoader):
    """Raises the signal in this process when batch number `at` is asked for."""

    def __init__(self, config, at, number=signal.SIGTERM):
        super().__init__(config)
        self.at = at
        self.number = number

    def __iter__(self):
        for batch in super().__iter__():
            if self.position == self.at:
                signal.raise_signal(self.number)
            yield batch


def test_a_run_leaves_what_the_documentation_says(uninterrupted):
    directory, result = uninterrupted
    assert result.step == 12
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "run.lock",
    ]
    assert checkpoints(directory) == [6, 12]
    written = rows(directory)
    assert [row["step"] for row in written] == list(range(1, 13))
    assert written[-1]["tokens"] == 12 * 64
    assert {"loss", "cross_entropy", "z_loss", "grad_norm", "learning_rate"} <= set(written[0])
    assert written[-1]["loss"] < written[0]["loss"]
    assert [row["step"] for row in read_metrics(directory) if "tokens_per_second" in row] == [
        3,
        6,
        9,
        12,
    ]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal_and_resumed_is_bit_identical(uninterrupted, tmp_path, number, status):
    directory, result = uninterrupted
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stop:
        trainer(tmp_path, loader=StopAfter(CONFIG, at=5, number=number)).fit()
    assert stop.value.code == status
    assert signal.getsignal(number) is before
    # The step of the batch at which the signal came was still made.
    assert checkpoints(tmp_path) == [5]
    resumed = trainer(tmp_path).fit()
    assert rows(tmp_path) == rows(directory)
    assert checkpoints(tmp_path) == checkpoints(directory)
    expected = params(result.model)
    for name, value in params(resumed.model).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_finished_run_is_only_read(uninterrupted, capfd):
    directory, result = uninterrupted
    written = (directory / "metrics.jsonl").read_text()
    again = trainer(directory).fit()
    for name, value in params(again.model).items():
        np.testing.assert_array_equal(value, params(result.model)[name])
    assert (directory / "metrics.jsonl").read_text() == written


def test_a_crash_resumes_from_the_newest_checkpoint(uninterrupted, tmp_path):
    class Crashes(CountingLoader):
        def __iter__(self):
            for batch in super().__iter__():
                if self.position == 10:
                    raise OSError("the disk went away")
                yield batch

    directory, result = uninterrupted
    with pytest.raises(OSError, match="went away"):
        trainer(tmp_path, loader=Crashes(CONFIG)).fit()
    assert checkpoints(tmp_path) == [6, 8]
    resumed = trainer(tmp_path).fit()
    assert rows(tmp_path) == rows(directory)
    for name, value in params(resumed.model).items():
        np.testing.assert_array_equal(value, params(result.model)[name])


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since(uninterrupted, tmp_path, capfd):
    directory, _ = uninterrupted
    with pytest.raises(Stopped):
        trainer(tmp_path, loader=StopAfter(CONFIG, at=9)).fit()
    assert checkpoints(tmp_path) == [6, 9]
    (tmp_path / "checkpoints" / "9" / "state" / "manifest.ocdbt").write_bytes(b"")
    trainer(tmp_path).fit()
    assert "9 is damaged" in capfd.readouterr().err
    assert rows(tmp_path) == rows(directory)
    assert checkpoints(tmp_path) == checkpoints(directory)


def test_another_configuration_is_refused_unless_allowed(uninterrupted, tmp_path):
    directory, _ = uninterrupted
    other = dataclasses.replace(CONFIG, seed=3)
    with pytest.raises(UserError, match=r"another configuration \(seed: 0 -> 3\)"):
        trainer(directory, other).fit()
    assert json.loads((directory / "config.json").read_text())["seed"] == 0
    # Longer training with the same schedule is no other run.
    with pytest.raises(UserError, match="past the 6 steps"):
        trainer(directory, dataclasses.replace(CONFIG, steps=6)).fit()


def test_evaluators_run_on_their_steps_and_after_the_last(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(model)
        return {"norm": jax.numpy.linalg.norm(model.head.kernel[...])}

    config = dataclasses.replace(CONFIG, steps=8)
    trainer(tmp_path, config, evaluators=[("held-out", 3, evaluate)]).fit()
    found = [row for row in rows(tmp_path) if "held-out/norm" in row]
    assert [row["step"] for row in found] == [3, 6, 8]
    assert len({row["held-out/norm"] for row in found}) == 3
    assert isinstance(seen[0], Decoder)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]


@dataclasses.dataclass(frozen=True)
class Breaks:
    """A loss that is no number from the fifth step on."""

    def __call__(self, model, batch, rng):
        del rng
        total = model.head.kernel[...].sum() * batch["factor"].sum()
        return Mean(total, jax.numpy.float32(1)), {}


class FactorLoader(CountingLoader):
    def __iter__(self):
        for _ in super().__iter__():
            yield {"factor": np.full((4,), np.nan if self.position >= 5 else 1, np.float32)}


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path):
    config = dataclasses.replace(
        CONFIG, objective=Breaks(), checkpoint=CheckpointConfig(interval=1), log_interval=100
    )
    with pytest.raises(UserError, match=r"the loss is nan at step 5 \(newest checkpoint: .*/4\)"):
        trainer(tmp_path, config, loader=FactorLoader(config)).fit()
    # Nothing broken was saved.
    assert checkpoints(tmp_path) == [1, 2, 3, 4]
    assert rows(tmp_path)[-1]["step"] == 5


def test_data_that_end_or_do_not_fit_are_errors(tmp_path):
    class Short(CountingLoader):
        def __iter__(self):
            return (batch for batch, _ in zip(super().__iter__(), range(3), strict=False))

    with pytest.raises(UserError, match="the data ended after step 3 of 12"):
        trainer(tmp_path / "a", loader=Short(CONFIG)).fit()
    wide = CountingLoader(dataclasses.replace(CONFIG, seq_len=32))
    with pytest.raises(UserError, match=r"tokens of shape \(4, 32\).*seq_len=16"):
        trainer(tmp_path / "b", loader=wide).fit()


def test_meshes_and_directories_that_do_not_fit_are_refused(tmp_path):
    loader = CountingLoader(CONFIG)
    with pytest.raises(UserError, match=r"batch_size=4 .* 8 devices; choose a multiple of 8"):
        Trainer(CONFIG, loader, tmp_path)
    with pytest.raises(UserError, match="tensor=8 does not divide n_kv_heads=2"):
        Trainer(dataclasses.replace(CONFIG, mesh="tensor=8"), loader, tmp_path)
    with pytest.raises(UserError, match="must be local"):
        Trainer(CONFIG, loader, "gs://bucket/run", mesh=one_device())


def test_progress_lines_tell_loss_speed_utilisation_and_time_left(tmp_path, capfd):
    config = dataclasses.replace(CONFIG, peak_flops=1e12, tensorboard=True)
    trainer(tmp_path, config, show_progress=True).fit()
    lines = capfd.readouterr().err.splitlines()
    pattern = r"step 6/12  loss \d\.\d{4}  [\d.]+k? tok/s  MFU [\d.]+%  ETA \d\d:\d\d"
    assert any(re.fullmatch(pattern, line) for line in lines), lines
    assert read_metrics(tmp_path)[-1]["mfu"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_checkpoints_may_lie_elsewhere(tmp_path):
    from olmax.training.checkpoints import restore_model

    elsewhere = tmp_path / "elsewhere"
    checkpoint = CheckpointConfig(interval=None, directory=str(elsewhere))
    config = dataclasses.replace(CONFIG, steps=2, checkpoint=checkpoint)
    trainer(tmp_path / "run", config).fit()
    assert (elsewhere / "2" / "metadata.json").exists()
    assert restore_model(str(tmp_path / "run")).config == CONFIG.model


def program(directory, steps, delay, cache, repository):
    """Starts the tiny run as a process of its own."""
    paths = [str(repository / "src"), str(repository)]
    return subprocess.Popen(
        [
            sys.executable,
            tiny_training.__file__,
            str(directory),
            str(steps),
            str(delay),
            str(cache),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    return error


def newest_directory(directory):
    """Step of the newest checkpoint directory, complete or not; 0 without one."""
    root = directory / "checkpoints"
    steps = [int(path.name) for path in root.iterdir()] if root.exists() else []
    return max(steps, default=0)


def wait_for_step(process, directory, step, timeout=300):
    """Until the process has begun a checkpoint of this step or a later one, or has ended."""
    end = time.monotonic() + timeout
    while process.poll() is None and newest_directory(directory) < step:
        assert time.monotonic() < end
        time.sleep(0.001)


def last_checksums(directory):
    root = checkpoint_files.epath.Path(directory / "checkpoints")
    metadata = read_metadata(valid_checkpoints(root)[-1])
    return metadata.step, metadata.arrays


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="3"), pytest.param(20, id="20", marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_ends_bit_identical(kills, tmp_path, repository):
    steps, delay, cache = 10 * kills + 10, 0.02, tmp_path / "cache"
    finish(program(tmp_path / "whole", steps, 0.0, cache, repository))
    seed = random.randrange(10**6)
    print(f"random moments of seed {seed}")
    moments = random.Random(seed)
    killed = 0
    for _ in range(kills):
        # By progress, so that a slow machine is killed at as many different places: some steps
        # further than the last time (a checkpoint every second step), and any moment from there.
        target = newest_directory(tmp_path / "killed") + 2 * moments.randint(1, 5)
        process = program(tmp_path / "killed", steps, delay, cache, repository)
        wait_for_step(process, tmp_path / "killed", target)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.2))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    assert killed > kills // 2
    finish(program(tmp_path / "killed", steps, 0.0, cache, repository))
    assert last_checksums(tmp_path / "killed") == last_checksums(tmp_path / "whole")
    assert last_checksums(tmp_path / "killed")[0] == steps
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert checkpoints(tmp_path / "killed") == checkpoints(tmp_path / "whole")
