"""The command line: presets, overrides, dry runs and mistakes."""

import json

import pytest

from experiments.olmo2.__main__ import main, parse


def test_dry_run_prints_configuration_sizes_and_rates(capsys):
    assert main(["all", "--preset", "olmo2-7b", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in ("7,298,617,344", "6,887,575,552", "6.14988e-05", "1.771e+23", "11,931",
                 "dolmino_mix_1124_50b", "47.23", "z-loss 1e-4"):  # fmt: skip
        assert text in out, text
    config = json.JSONDecoder().raw_decode(out[out.index("{") :])[0]
    assert config["pretrain"]["schedule"]["duration"] == 5e12
    assert config["pretrain"]["model"]["n_layers"] == 32


def test_overrides_with_dots():
    command = parse(
        ["pretrain", "--preset", "tiny", "--pretrain.schedule.peak", "1e-3", "--run-dir", "x",
         "--anneal.ingredients.1.seed", "7", "--corpus.mixes.pretrain.tests", "0.1",
         "--pretrain.execution.compute-dtype", "bfloat16"]
    )  # fmt: skip
    recipe = command.recipe
    assert command.stage == "pretrain"
    assert recipe.pretrain.schedule.peak == 1e-3
    assert [i.seed for i in recipe.anneal.ingredients] == [42, 7, 666]
    assert recipe.corpus.mixes["pretrain"]["tests"] == 0.1
    assert recipe.pretrain.execution.compute_dtype == "bfloat16"
    assert recipe.directory == "x"


def test_unknown_preset_is_one_line_and_status_2(capsys):
    assert main(["all", "--preset", "tyni"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "unknown preset 'tyni'" in error and "tiny" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["all", "--preset", "tiny", "--pretrain.stepz", "3"],
        ["al", "--preset", "tiny"],
        ["all", "--preset", "tiny", "--pretrain.steps", "many"],
        [],
    ],
)
def test_bad_options_end_with_one_line_and_status_2(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments.olmo2: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("mesh", "said"),
    [("chips=2", "unknown axis 'chips'"), ("tensor=3", "needs a multiple of 3 devices")],
)
def test_a_bad_mesh_is_said_before_anything_is_done(mesh, said, tmp_path, capsys):
    run_dir = tmp_path / "run"
    command = ["all", "--preset", "smoke", "--run-dir", str(run_dir), "--pretrain.mesh", mesh]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not run_dir.exists()


def test_bad_value_of_the_configuration_is_a_user_error(capsys):
    try:
        status = main(["all", "--preset", "tiny", "--dry-run", "--pretrain.batch-size", "0"])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert "batch_size must be at least 1" in capsys.readouterr().err


def test_published_recipe_without_data_says_what_to_do(tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert main(["pretrain", "--preset", "olmo2-1b", "--run-dir", run_dir]) == 2
    assert "prepare" in capsys.readouterr().err
    assert main(["prepare", "--preset", "olmo2-1b", "--run-dir", run_dir]) == 2
    error = capsys.readouterr().err
    assert "olmo_mix_1124" in error and "--dry-run" in error and error.count("\n") == 1
