"""The published OLMoE recipe, number by number (specs/olmoe.md section 2), and the command line."""

import json

import numpy as np
import pytest

from experiments.olmoe import dry_run, published
from experiments.olmoe.__main__ import main, parse
from experiments.olmoe.presets import ABLATIONS, PRESETS, get_recipe
from olmax.errors import UserError
from olmax.training.schedules import learning_rate


def rate(recipe, step):
    config = recipe.train
    return float(learning_rate(config.resolved_schedule, step, config.tokens_per_step))


def test_published_recipe():
    recipe = get_recipe("olmoe-1b-7b")
    assert recipe.train.tokens_per_step == 4_194_304
    numbers = dry_run.plan(recipe)
    assert numbers["models"]["moe"]["parameters"] == 6_919_161_856
    assert numbers["models"]["moe"]["active_parameters"] == 1_281_951_744
    assert numbers["steps"] == 1_223_842
    assert numbers["tokens"] == pytest.approx(5.133e12, rel=1e-4)
    optimizer = recipe.train.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.95, 1e-8)
    assert optimizer.weight_decay == 0.1 and optimizer.no_decay == ()
    assert optimizer.clip_norm == 1.0 and recipe.train.seed == 6198
    router = recipe.train.objective.router
    assert (router.load_balance, router.z, router.divide_z_by_top_k) == (0.01, 0.001, True)
    assert router.statistics == "device" and recipe.train.objective.z_loss == 0


def test_published_schedule():
    recipe = get_recipe("olmoe-1b-7b")
    assert rate(recipe, 2500) == pytest.approx(4e-4, rel=1e-9)
    assert rate(recipe, 1250) == pytest.approx(2e-4, rel=1e-9)
    # The cosine ends with 5T tokens; what is trained beyond stays at its floor.
    assert rate(recipe, 5e12 / 4_194_304) == pytest.approx(4e-5, rel=1e-9)
    assert rate(recipe, 1_200_000) == pytest.approx(4e-5, rel=1e-9)
    middle = 2500 + (5e12 / 4_194_304 - 2500) / 2
    assert rate(recipe, middle) == pytest.approx(2.2e-4, rel=1e-9)
    falling = recipe.anneal.schedule
    np.testing.assert_allclose(
        [float(learning_rate(falling, step)) for step in (0, 11_921, 23_842)], [4e-5, 2e-5, 0],
        atol=1e-12,
    )  # fmt: skip
    assert recipe.anneal_tokens == pytest.approx(100e9, rel=1e-4)
    assert recipe.tokens == pytest.approx(5.033e12, rel=1e-4)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_have_the_same_active_width(name):
    recipe = get_recipe(name)
    model = recipe.train.model
    width = model.d_ff if model.moe is None else (
        model.d_ff * model.moe.experts_per_token + model.moe.shared_d_ff
    )  # fmt: skip
    assert width == 8192
    assert recipe.tokens == pytest.approx(ABLATIONS[name], rel=1e-4)
    decayed = () if model.moe is not None else ("embedder.embedding",)
    assert recipe.train.optimizer.no_decay == decayed


def test_every_run_of_the_miniature_differs_in_one_thing():
    recipe = get_recipe("tiny")
    recipe.check()
    runs = recipe.runs()
    assert set(runs) == {
        "moe", "dense", "unbalanced", "8-experts", "4-experts", "shared", "expert-choice",
    }  # fmt: skip
    assert runs["unbalanced"].model == runs["moe"].model
    assert runs["unbalanced"].objective.router.load_balance == 0
    for name, config in runs.items():
        same = ("batch_size", "seq_len", "steps", "optimizer", "schedule", "seed")
        assert all(getattr(config, f) == getattr(runs["moe"], f) for f in same)
        active = config.model.num_active_params / runs["moe"].model.num_active_params
        assert active == pytest.approx(1, abs=0.01), name


def test_dry_run_of_the_published_recipe(capsys):
    assert main(["all", "--preset", "olmoe-1b-7b", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in ("6,919,161,856", "1,281,951,744", "1,178,929,152", "1,223,842", "23842",
                 "0.0004", "4e-05", "1.25e-4"):  # fmt: skip
        assert text in out, text
    config = json.JSONDecoder().raw_decode(out[out.index("{") :])[0]
    assert config["train"]["model"]["moe"]["n_experts"] == 64


def test_overrides_and_mistakes(capsys):
    command = parse(["train", "--train.objective.router.z", "0.01", "--train.model.moe.n-experts",
                     "32", "--variants.0.name", "other"])  # fmt: skip
    assert command.recipe.train.objective.router.z == 0.01
    assert command.recipe.train.model.moe.n_experts == 32
    assert command.recipe.variants[0].name == "other"
    for arguments, said in (
        (["all", "--preset", "tyni"], "unknown preset 'tyni'"),
        (["all", "--train.steps", "many"], "train.steps"),
        (["all", "--train.mesh", "expert=3"], "needs"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    with pytest.raises(UserError, match="two are called 'moe'"):
        parse(["all", "--variants.0.name", "moe"]).recipe.check()


def test_a_published_recipe_without_data_says_what_to_do(tmp_path, capsys):
    run = ["prepare", "--preset", "olmoe-1b-7b", "--run-dir", str(tmp_path / "run")]
    assert main(run) == 2
    assert "olmax prepare" in capsys.readouterr().err


def test_published_tables_come_out_of_the_released_counts(data_dir, monkeypatch, capsys):
    if not (data_dir / "olmoe_routing").is_dir():
        pytest.skip("no published counts")
    monkeypatch.setenv("OLMAX_DATA_DIR", str(data_dir))
    assert main(["published"]) == 0
    out = capsys.readouterr().out
    for layers in published.load()["domain_specialization"]["rows"].values():
        for highest, expert, _ in layers:
            assert f"{highest} ({expert})" in out
    monkeypatch.setenv("OLMAX_DATA_DIR", "/nowhere")
    assert main(["published"]) == 2


def test_digitised_curves_end_where_the_table_says():
    paper = published.load()
    losses = {name: row[1] for name, row in paper["ablations"]["rows"].items()}
    curves = paper["curves"]
    ends = {
        "64 experts, 8 active": curves["moe"]["series"]["MoE 64 experts"],
        "dense 1.3B": curves["moe"]["series"]["dense 1.3B"],
        "32 experts, 4 active": curves["granularity"]["series"]["32 experts"],
        "8 experts, 1 active": curves["granularity"]["series"]["8 experts"],
        "without (10B)": curves["balance"]["series"]["without"],
    }
    for name, points in ends.items():
        assert points[-1][1] == pytest.approx(losses[name], abs=0.006), name


def test_presets_are_listed():
    assert {"tiny", "smoke", "olmoe-1b-7b"} < set(PRESETS)
