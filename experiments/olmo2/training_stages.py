"""Stages pretrain, anneal and soup."""

import dataclasses
import pathlib
import shutil

import jax

from experiments.embedded import held_out_evaluators
from experiments.olmo2.dry_run import mix_rates
from experiments.olmo2.preparation import data_directory, load_tokenizer, open_loader, read_held_out
from experiments.olmo2.recipe import Ingredient, Recipe, ingredient_name
from olmax.data.prepared import Manifest
from olmax.merging.soup import soup
from olmax.training.anneal import anneal_config
from olmax.training.config import TrainConfig
from olmax.training.trainer import Evaluator, Trainer

PRETRAIN, ANNEAL, SOUP = "pretrain", "anneal", "soup"


def pretrain(recipe: Recipe, directory: pathlib.Path) -> None:
    """Stage 1; continues from the newest checkpoint."""
    mix = recipe.pretrain_mix
    config = _with_data(recipe.pretrain, recipe, mix, recipe.data_seed, directory)
    _train(config, recipe, mix, recipe.data_seed, directory, directory / PRETRAIN)


def anneal(recipe: Recipe, number: int, directory: pathlib.Path) -> None:
    """One annealing run of stage 2, from the last checkpoint of stage 1."""
    ingredient = recipe.anneal.ingredients[number]
    anneal_into(recipe, ingredient, directory, ingredient_directory(directory, number))


def anneal_into(
    recipe: Recipe, ingredient: Ingredient, directory: pathlib.Path, output: pathlib.Path
) -> None:
    """An annealing run into `output`: optimizer state and learning rate of the last checkpoint of
    stage 1, a new data order, linearly to zero."""
    config = anneal_config(
        str(directory / PRETRAIN),
        steps=ingredient.steps + ingredient.steps_at_zero,
        zero_at=ingredient.steps,
        seed=ingredient.seed,
        # The rate of another step than the last was asked for: take it from the schedule.
        peak=recipe.anneal_peak() if recipe.anneal.learning_rate_step else None,
        batch_size=recipe.anneal.batch_size,
    )
    config = _with_data(config, recipe, ingredient.mix, ingredient.seed, directory)
    _train(config, recipe, ingredient.mix, ingredient.seed, directory, output)


def make_soup(recipe: Recipe, directory: pathlib.Path) -> None:
    """The mean of the souped ingredients as a Hugging Face directory; of none, the first one's
    parameters as they are."""
    numbers = [i for i, ingredient in enumerate(recipe.anneal.ingredients) if ingredient.souped]
    paths = [ingredient_directory(directory, i) for i in numbers]
    if len(paths) > 1:
        shutil.rmtree(directory / SOUP, ignore_errors=True)
        soup(paths, directory / SOUP, dtype="float32")
        return
    from olmax.interop import save_huggingface
    from olmax.training.checkpoints import restore_model

    only = ingredient_directory(directory, numbers[0] if numbers else 0)
    shutil.rmtree(directory / SOUP, ignore_errors=True)
    tokenizer = data_directory(recipe, recipe.pretrain_mix, directory)
    save_huggingface(restore_model(str(only)), directory / SOUP, tokenizer=tokenizer)


def ingredient_directory(directory: pathlib.Path, number: int) -> pathlib.Path:
    """Run directory of an annealing run."""
    return directory / ANNEAL / ingredient_name(number)


def _with_data(
    config: TrainConfig, recipe: Recipe, mix: str, seed: int, directory: pathlib.Path
) -> TrainConfig:
    manifest = Manifest.read(data_directory(recipe, mix, directory))
    described = {
        "mix": mix,
        "rates": mix_rates(recipe, mix),
        "seed": seed,
        "fingerprint": manifest.fingerprint,
        "tokenizer": manifest.tokenizer_fingerprint,
    }
    return dataclasses.replace(config, data=described)


def _train(
    config: TrainConfig,
    recipe: Recipe,
    mix: str,
    seed: int,
    directory: pathlib.Path,
    output: pathlib.Path,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = data_directory(recipe, mix, directory) / "tokenizer.json"
    if jax.process_index() == 0:
        shutil.copyfile(tokenizer, output / "tokenizer.json")
    with open_loader(
        recipe, mix, batch_size=config.batch_size, seed=seed, directory=directory
    ) as loader:
        Trainer(config, loader, output, evaluators=_evaluators(recipe, directory)).fit()


def _evaluators(recipe: Recipe, directory: pathlib.Path) -> list[Evaluator]:
    """Bits per byte on a part of the held-out documents."""
    if not recipe.evaluation.every or not read_held_out(directory):
        return []
    tokenizer = load_tokenizer(recipe, directory)
    return held_out_evaluators(
        directory, tokenizer, every=recipe.evaluation.every, seq_len=recipe.pretrain.seq_len
    )
