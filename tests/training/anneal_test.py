"""Annealing from a checkpoint: rate found there, linearly to zero, optimizer state kept."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.models import Decoder, get_preset
from olmax.training import checkpoint_files, config_json
from olmax.training.anneal import anneal_config, learning_rate_at
from olmax.training.config import TrainConfig
from olmax.training.model_checkpoint import save_model
from olmax.training.recorder import read_metrics
from olmax.training.schedules import ScheduleConfig
from tests.training.tiny_training import CONFIG, CountingLoader, trainer


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pretrained")
    trainer(directory).fit()
    return directory


def test_the_rate_is_the_one_of_the_last_update(pretrained):
    last = read_metrics(pretrained)[-1]
    assert learning_rate_at(str(pretrained)) == pytest.approx(last["learning_rate"], rel=1e-6)
    middle = learning_rate_at(str(pretrained / "checkpoints" / "6"))
    assert middle == pytest.approx(read_metrics(pretrained)[5]["learning_rate"], rel=1e-6)
    assert middle > last["learning_rate"]


def test_the_released_7b_starts_at_its_published_rate(tmp_path):
    config = TrainConfig(
        model=get_preset("olmo2-7b"),
        batch_size=1024,
        seq_len=4096,
        tokens=3_900_000_000_000,
        schedule=ScheduleConfig(
            "cosine", 3e-4, 8_388_608_000, 5e12, final_fraction=0.1, units="tokens"
        ),
    )
    directory = checkpoint_files.epath.Path(tmp_path) / "928000"
    directory.mkdir()
    config_json.dump(config, directory / "config.json")
    checkpoint_files.write_metadata(directory, checkpoint_files.Metadata(928_000, True, {}))
    annealing = anneal_config(str(tmp_path), steps=11_931, zero_at=11_921, seed=42)
    assert f"{annealing.schedule.peak:.5e}" == "6.14988e-05"
    assert annealing.start_from == str(directory)
    assert annealing.model == config.model and annealing.optimizer == config.optimizer
    assert (annealing.schedule.kind, annealing.schedule.duration) == ("linear", 11_921)


def test_annealing_ends_at_zero_and_keeps_the_optimizer_state(pretrained, tmp_path):
    config = anneal_config(
        str(pretrained), steps=6, zero_at=4, seed=1, data={"mix": "other"}, log_interval=1
    )
    trainer(tmp_path, config, loader=CountingLoader(config, seed=1)).fit()
    rates = [row["learning_rate"] for row in read_metrics(tmp_path)]
    start = learning_rate_at(str(pretrained))
    np.testing.assert_allclose(rates, start * np.array([0.75, 0.5, 0.25, 0, 0, 0]), rtol=1e-5)
    root = checkpoint_files.epath.Path(tmp_path / "checkpoints" / "6")
    before = checkpoint_files.epath.Path(pretrained / "checkpoints" / "12")
    # Adam goes on counting: its moments are not started anew.
    count = "opt_state.adam.count"
    arrays = [checkpoint_files.read_metadata(path).arrays for path in (before, root)]
    assert [a[count]["checksum"] for a in arrays] == [12, 18]
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["start_from"] == str(before) and stored["data"] == {"mix": "other"}


def test_the_first_step_is_the_one_pretraining_would_have_made(pretrained, tmp_path):
    """With the same batch and rate, annealing's first update is pretraining's thirteenth."""
    longer = dataclasses.replace(CONFIG, steps=13)
    expected = trainer(tmp_path / "longer", longer).fit()
    rate = read_metrics(tmp_path / "longer")[-1]["learning_rate"]
    config = anneal_config(str(pretrained), steps=1, zero_at=2, peak=2 * rate, seed=0)
    loader = CountingLoader(config)
    loader.set_state({"position": 12, "seed": 0})
    got = trainer(tmp_path / "anneal", config, loader=loader).fit()
    np.testing.assert_allclose(
        np.asarray(got.model.head.kernel[...]),
        np.asarray(expected.model.head.kernel[...]),
        atol=1e-6,
    )


def test_a_checkpoint_of_a_model_alone_is_refused(tmp_path):
    save_model(Decoder(CONFIG.model, rngs=nnx.Rngs(0)), tmp_path / "model")
    with pytest.raises(UserError, match="holds a model only"):
        anneal_config(str(tmp_path / "model"), steps=1, seed=0)


def test_a_damaged_or_missing_start_is_an_error(pretrained, tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        anneal_config(str(tmp_path / "nothing"), steps=1, seed=0)
    shutil.copytree(pretrained, tmp_path / "run")
    config = anneal_config(str(tmp_path / "run"), steps=1, seed=0)
    (tmp_path / "run" / "checkpoints" / "12" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match=r"start_from=.*12 is damaged"):
        trainer(tmp_path / "anneal", config).fit()
