"""The published recipes against their golden values and the released configurations."""

import dataclasses

import numpy as np
import pytest
import yaml

from experiments.olmo2.dry_run import plan
from experiments.olmo2.presets import PRESETS, get_recipe
from olmax.errors import UserError
from olmax.training.schedules import learning_rate

PUBLISHED = ("olmo2-1b", "olmo2-7b", "olmo2-13b", "olmo2-32b")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_consistent_and_documented(name):
    recipe = get_recipe(name)
    recipe.check()
    assert f"--preset {name}" in PRESETS[name].__doc__
    assert "Expected:" in PRESETS[name].__doc__
    for rates in plan(recipe)["mixes"].values():
        assert sum(rates.values()) == pytest.approx(1.0)


# specs/olmo2.md sections 1, 4 and 10.
@pytest.mark.parametrize(
    ("name", "parameters", "peak", "tokens", "flops"),
    [
        ("olmo2-1b", 1_484_916_736, 7.44873e-5, 4.05e12, 0.36e23),
        ("olmo2-7b", 7_298_617_344, 6.14988e-5, 4.05e12, 1.77e23),
        ("olmo2-13b", 13_716_198_400, 9.0e-5, 5.6e12, 4.61e23),
        ("olmo2-32b", 32_234_279_936, 6.6232e-5, 6.6e12, 12.7e23),
    ],
)
def test_golden_values(name, parameters, peak, tokens, flops):
    numbers = plan(get_recipe(name))
    assert numbers["parameters"] == parameters
    assert get_recipe(name).anneal_peak() == pytest.approx(peak, rel=1e-5)
    assert numbers["model_tokens"] == pytest.approx(tokens, rel=0.01)
    assert numbers["flops"] == pytest.approx(flops, rel=0.01)


def test_learning_rate_of_the_7b_over_its_life():
    recipe = get_recipe("olmo2-7b")
    schedule, per_step = recipe.pretrain.resolved_schedule, recipe.pretrain.tokens_per_step
    rates = learning_rate(schedule, np.array([0, 1000, 2000, 928_000, 928_646]), per_step)
    assert rates == pytest.approx([0, 1.5e-4, 3e-4, 6.14988e-5, 6.13511e-5], rel=1e-5)


def test_anneal_of_the_7b_reaches_zero_and_stays():
    recipe = get_recipe("olmo2-7b")
    ingredient = recipe.anneal.ingredients[0]
    rates = learning_rate(recipe.anneal_schedule(ingredient), np.arange(11920, 11932))
    assert rates[0] > 0 and np.all(rates[1:] == 0)
    assert ingredient.steps + ingredient.steps_at_zero == 11931


@pytest.mark.parametrize(
    ("name", "seeds", "steps", "souped"),
    [
        ("olmo2-1b", [42, 42069, 666], [23852] * 3, 0),
        ("olmo2-7b", [42, 42069, 666], [11931] * 3, 3),
        ("olmo2-13b", [1110, 2662, 6209, 2662], [11931] * 3 + [35773], 4),
        ("olmo2-32b", [1110, 2662, 2662], [11921] * 2 + [35763], 3),
    ],
)
def test_ingredients(name, seeds, steps, souped):
    ingredients = get_recipe(name).anneal.ingredients
    assert [i.seed for i in ingredients] == seeds
    assert [i.steps + i.steps_at_zero for i in ingredients] == steps
    assert sum(i.souped for i in ingredients) == souped


CONFIGS = {
    "olmo2-1b": ("OLMo2-1B-stage1", ["OLMo2-1B-stage2-seed42"]),
    "olmo2-7b": ("OLMo2-7B-stage1", ["OLMo2-7B-stage2-seed42"]),
    "olmo2-13b": (
        "OLMo2-13B-stage1",
        ["OLMo2-13B-stage2-seed1110-100B", "OLMo2-13B-stage2-seed2662-300B"],
    ),
}
# Where a preset departs from the released configuration on purpose; every entry has a note.
DIFFERENCES = {
    "olmo2-1b": {"z_loss": (1e-5, 1e-4)},
    "olmo2-7b": {"z_loss": (1e-5, 1e-4)},
    "olmo2-13b": {"z_loss": (1e-5, 1e-4), "peak": (3e-4, 9e-4)},
}


def _read(data_dir, name):
    path = data_dir / "olmo2_official_configs" / f"{name}.nopaths.yaml"
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_stage_one_equals_the_released_configuration(name, data_dir):
    config, recipe = _read(data_dir, CONFIGS[name][0]), get_recipe(name)
    model, optimizer, scheduler = config["model"], config["optimizer"], config["scheduler"]
    feed_forward = model.get("mlp_hidden_size") or model["mlp_ratio"] * model["d_model"]
    released = {
        "d_model": model["d_model"],
        "n_layers": model["n_layers"],
        "n_heads": model["n_heads"],
        "d_ff": feed_forward // 2,
        "vocab_size": model["embedding_size"],
        "max_seq_len": model["max_sequence_length"],
        "rope_theta": model["rope_theta"],
        "norm_eps": float(model["layer_norm_eps"]),
        "init_std": model["init_std"],
        "tied": model["weight_tying"],
        "norm_after": model["norm_after"],
        "qk_norm": model["attention_layer_norm"],
        "z_loss": float(config["auxiliary_loss_multiplier"]),
        "peak": float(optimizer["learning_rate"]),
        "weight_decay": optimizer["weight_decay"],
        "eps": float(optimizer["eps"]),
        "betas": optimizer["betas"],
        "decays_norms": optimizer["decay_norm_and_bias"],
        "decays_embeddings": optimizer["decay_embeddings"],
        "clip": config["max_grad_norm"],
        "schedule": (scheduler["name"], scheduler["units"]),
        "warmup": scheduler["t_warmup"],
        "duration": float(scheduler["t_max"]),
        "final_fraction": scheduler["alpha_f"],
        "batch_size": config["global_train_batch_size"],
        "seed": config["seed"],
        "repetition_filter": config["data"]["instance_filter"],
    }
    train = recipe.pretrain
    kinds = {"cosine": "cosine_with_warmup"}
    ours = {
        "d_model": train.model.d_model,
        "n_layers": train.model.n_layers,
        "n_heads": train.model.n_heads,
        "d_ff": train.model.d_ff,
        "vocab_size": train.model.vocab_size,
        "max_seq_len": train.seq_len,
        "rope_theta": train.model.rope_theta,
        "norm_eps": train.model.norm_eps,
        "init_std": train.model.init_std,
        "tied": train.model.tie_embeddings,
        "norm_after": train.model.norm_position == "output",
        "qk_norm": train.model.qk_norm == "full",
        "z_loss": train.objective.z_loss,
        "peak": train.schedule.peak,
        "weight_decay": train.optimizer.weight_decay,
        "eps": train.optimizer.eps,
        "betas": [train.optimizer.beta1, train.optimizer.beta2],
        "decays_norms": not any("norm" in pattern for pattern in train.optimizer.no_decay),
        "decays_embeddings": "embedder.embedding" not in train.optimizer.no_decay,
        "clip": train.optimizer.clip_norm,
        "schedule": (kinds[train.schedule.kind], train.schedule.units),
        "warmup": train.schedule.warmup,
        "duration": train.schedule.duration,
        "final_fraction": train.schedule.final_fraction,
        "batch_size": train.batch_size,
        "seed": train.seed,
        "repetition_filter": {
            "repetition_max_period": 13,
            "repetition_min_period": 1,
            "repetition_max_count": 32,
        }
        if recipe.repetition_filter
        else None,
    }
    differences = {k: (released[k], ours[k]) for k in released if released[k] != ours[k]}
    assert differences == DIFFERENCES[name]
    assert recipe.data_seed == config["seed"]
    words = {"z_loss": "z-loss", "peak": "learning rate"}
    for field in differences:
        assert any(words[field] in note for note in recipe.notes)


@pytest.mark.parametrize("name", CONFIGS)
def test_stage_two_equals_the_released_configurations(name, data_dir):
    recipe = get_recipe(name)
    for config in (_read(data_dir, file) for file in CONFIGS[name][1]):
        ingredients = [
            i
            for i in recipe.anneal.ingredients
            if i.seed == config["seed"] and i.steps + i.steps_at_zero == config["stop_at"]
        ]
        assert len(ingredients) == 1
        assert config["scheduler"]["name"] == "linear_with_warmup"
        assert config["scheduler"]["t_warmup"] == 0 and config["scheduler"]["alpha_f"] == 0
        assert recipe.anneal.batch_size == config["global_train_batch_size"]
        # The configuration prints the rate with five digits.
        released = float(config["optimizer"]["learning_rate"])
        assert recipe.anneal_peak() == pytest.approx(released, rel=1e-4)
        assert float(str(config["max_duration"]).removesuffix("T")) == pytest.approx(
            ingredients[0].steps * recipe.anneal.batch_size * 4096, rel=1e-4
        )


def test_unknown_preset_names_near_ones():
    with pytest.raises(UserError, match=r"unknown preset 'olmo2-7'; did you mean olmo2-7b"):
        get_recipe("olmo2-7")


def test_two_equal_ingredients_are_refused():
    recipe = get_recipe("smoke")
    same = dataclasses.replace(recipe.anneal.ingredients[0])
    anneal = dataclasses.replace(recipe.anneal, ingredients=(same, same))
    with pytest.raises(UserError, match="same model"):
        dataclasses.replace(recipe, anneal=anneal).check()
