"""`olmax launch` as a user calls it: the plan's verdict first, files, and nothing run unasked."""

import json

import pytest

from olmax.cli.launch import Launch
from olmax.errors import UserError
from olmax.launching import intent

TRAIN = ("python", "-m", "experiments.olmo2", "pretrain", "--preset", "olmo2-7b")


def plan_file(tmp_path, **changes):
    made = {
        "model": "olmo2-7b",
        "topology": "v5p:4x4x4",
        "slices": 1,
        "mesh": {"fsdp": 64},
        "per_device_bytes": {"total": 10},
        "fits": True,
        "verdict": "fits: 5.2 of 95.7 GiB a device",
        "step_seconds": 0.97,
        "mfu": 0.4,
        "days": 12.0,
        "price": 123456.0,
        "parts": [],
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(made | changes))
    return str(path)


def launch(tmp_path, **kwargs):
    settings = dict(
        command=("python", "train.py"),
        runner="xpk",
        topology="v5p:4x4x4",
        cluster="pods",
        output=str(tmp_path / "launch"),
    )
    return Launch(**(settings | kwargs))


def test_the_verdict_comes_first_and_nothing_is_run(tmp_path, capsys):
    launch(tmp_path, plan=plan_file(tmp_path), env=("A=b",)).run()
    said = capsys.readouterr().out
    assert said.index("plan: fits: 5.2 of 95.7 GiB") < said.index("xpk workload create")
    assert "MFU 40%" in said and "$123,456" in said
    assert "Nothing was run" in said
    assert (tmp_path / "launch" / "olmax.env").read_text() == "A=b\n"


def test_what_does_not_fit_is_not_launched(tmp_path):
    path = plan_file(tmp_path, fits=False, verdict="does not fit: over by 3.1 GiB")
    with pytest.raises(UserError, match=r"not launched: .* over by 3\.1 GiB"):
        launch(tmp_path, plan=path).run()
    assert not (tmp_path / "launch").exists()


def test_a_plan_for_another_slice_does_not_count(tmp_path):
    with pytest.raises(UserError, match="plan for 1 x v5p:4x4x4, not for 2 x v5p:4x4x4"):
        launch(tmp_path, plan=plan_file(tmp_path), slices=2).run()


def test_missing_tools_are_named_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="xpk is not installed here; nothing was run"):
        launch(tmp_path, check=False, yes=True).run()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(topology=None), "needs --topology"),
        (dict(runner="slurm", topology=None), "needs --hosts or --topology"),
        (dict(runner="slurm", topology=None, hosts=0), "at least 1"),
        (dict(command=()), "no command"),
    ],
)
def test_bad_input(tmp_path, kwargs, message):
    with pytest.raises(UserError, match=message):
        launch(tmp_path, check=False, **kwargs).run()


def test_the_command_tells_what_it_trains():
    config = intent.train_config((*TRAIN, "--pretrain.batch-size", "512"))
    assert config.batch_size == 512
    assert config.model.n_layers == 32


def test_a_mistyped_option_is_found_before_the_pod_is_asked_for():
    with pytest.raises(UserError, match="refuses its options") as caught:
        intent.train_config((*TRAIN, "--pretrain.batchsize", "512"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [("python", "train.py"), ("python", "-m", "json.tool")])
def test_other_commands_need_a_plan(command):
    with pytest.raises(UserError, match="--plan"):
        intent.train_config(command)
