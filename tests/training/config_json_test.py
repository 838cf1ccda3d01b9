"""Configurations survive JSON and a command line, and say what is wrong."""

import dataclasses
import json

import pytest
import tyro

from olmax.errors import UserError
from olmax.models import get_preset
from olmax.training import config_json
from olmax.training.config import CheckpointConfig, TrainConfig, changed_fields
from olmax.training.optimizers import SkipStepConfig
from tests.training.tiny_training import CONFIG


def through_json(config):
    return config_json.from_json(json.loads(json.dumps(config_json.to_json(config))))


def test_round_trip_names_classes():
    config = dataclasses.replace(
        CONFIG,
        model=get_preset("llama3.1-8b"),
        data={"mixture": "dolmino", "rates": (0.5, 0.5), "none": None},
    )
    value = config_json.to_json(config)
    assert value["class"] == "olmax.training.config:TrainConfig"
    assert value["model"]["rope_scaling"]["class"] == "olmax.models.config:Llama3RopeScaling"
    assert through_json(config) == config


def test_files(tmp_path):
    config_json.dump(CONFIG, tmp_path / "config.json")
    assert config_json.load(tmp_path / "config.json") == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").write_text('{"class": ')
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        config_json.load(tmp_path / "config.json")
    with pytest.raises(UserError, match="no configuration at"):
        config_json.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["optimizer"].update(beta3=1), r"config\.optimizer: unknown key 'beta3'"),
        (lambda v: v.update(stepz=1), "config: unknown key 'stepz' for TrainConfig"),
        (lambda v: v.pop("model"), "config: .*model"),
        (lambda v: v["model"].update({"class": "os:system"}), "no configuration class"),
        (lambda v: v["model"].update({"class": "olmax.models.config:Gone"}), "'.*Gone' is no"),
        (lambda v: v["schedule"].update(peak=-1), r"config\.schedule: .*peak"),
    ],
)
def test_bad_files_are_errors_that_say_where(change, message):
    value = config_json.to_json(CONFIG)
    change(value)
    with pytest.raises(UserError, match=message):
        config_json.from_json(value)


def test_dot_overrides_from_a_command_line():
    arguments = "--schedule.peak 1e-5 --optimizer.skip-step.enabled --optimizer.no-decay a b"
    config = tyro.cli(TrainConfig, default=CONFIG, args=arguments.split())
    expected = dataclasses.replace(
        CONFIG,
        schedule=dataclasses.replace(CONFIG.schedule, peak=1e-5),
        optimizer=dataclasses.replace(
            CONFIG.optimizer, skip_step=SkipStepConfig(enabled=True), no_decay=("a", "b")
        ),
    )
    assert config == expected


def test_length_in_steps_or_tokens():
    config = dataclasses.replace(CONFIG, steps=None, tokens=1000)
    assert config.tokens_per_step == 64
    assert config.total_steps == 16
    assert dataclasses.replace(CONFIG, steps=7).total_steps == 7


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": None},
        {"tokens": 100},
        {"batch_size": 0},
        {"accumulation": 3},
        {"steps": 0},
    ],
)
def test_impossible_runs_are_refused(changes):
    with pytest.raises(UserError):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(UserError, match="interval"):
        CheckpointConfig(interval=0)


def test_changed_fields_are_those_that_determine_the_result():
    same = dataclasses.replace(CONFIG, steps=99, log_interval=1, mesh="fsdp=2", accumulation=2)
    assert changed_fields(CONFIG, same) == []
    other = dataclasses.replace(
        CONFIG, seed=1, optimizer=dataclasses.replace(CONFIG.optimizer, eps=1e-5)
    )
    assert changed_fields(CONFIG, other) == ["optimizer.eps: 1e-08 -> 1e-05", "seed: 0 -> 1"]
