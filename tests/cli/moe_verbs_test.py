"""`olmax upcycle` and `olmax routing`."""

import json

import numpy as np
import pytest

import olmax
from olmax.cli import main as cli
from olmax.cli.routing import Routing
from olmax.cli.upcycle import Upcycle
from olmax.data.tokenizer import train_bpe
from tests.interop import golden_models

TEXT = "the cat sat on the mat. "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = golden_models.write_checkpoint("olmoe", tmp_path_factory.mktemp("moe") / "model")
    train_bpe([TEXT * 9], vocab_size=300).save(path)
    return path


@pytest.fixture(scope="module")
def upcycled(model_directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("upcycled") / "model"
    verb = Upcycle(str(model_directory), str(path), experts=3, normalize_weights=True)
    assert cli.run(verb) == 0
    return path


def test_an_upcycled_model_scores_as_the_dense_one(model_directory, upcycled):
    pairs = [("the cat sat", " on the mat."), ("", "the")]
    dense, sparse = (olmax.load(path).score(pairs) for path in (model_directory, upcycled))
    for a, b in zip(dense, sparse, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    assert olmax.load(upcycled).config.moe.n_experts == 3


def test_training_starts_from_it_with_a_fresh_optimizer(upcycled, tmp_path):
    import dataclasses

    from tests.training.tiny_training import CONFIG, trainer

    config = dataclasses.replace(
        CONFIG, model=olmax.load(upcycled).config, steps=1, start_from=str(upcycled)
    )
    trained = trainer(tmp_path, config).fit().model
    before = np.asarray(olmax.load(upcycled).model.blocks.moe.down[...])
    after = np.asarray(trained.blocks.moe.down[...])
    # Adam's first update is at most the learning rate, here that of a half warmed-up peak.
    assert 0 < np.abs(after - before).max() < 2 * config.schedule.peak


def test_a_model_with_experts_is_not_upcycled(model, tmp_path, capsys):
    assert cli.run(Upcycle(str(model), str(tmp_path / "out"))) == 2
    assert "has experts already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_routing_of_a_checkpoint(model, upcycled, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT * 30 + name * 50)
    corpus = tuple(f"{name}={tmp_path / name}.txt" for name in ("a", "b"))
    output = tmp_path / "routing"
    verb = Routing(
        str(model), corpus, str(output), earlier=(f"same={model}",), window=16, tokens=64
    )
    assert cli.run(verb) == 0
    found = json.loads((output / "routing.json").read_text())
    assert found["tokens_by_domain"] == {"a": 80, "b": 80}
    assert found["saturation"]["same"]["k"] == [100, 100, 100]
    assert "Expert co-activation" in (output / "report.html").read_text()
    assert "Router saturation" in capsys.readouterr().out
    wrong = Routing(str(model), corpus, str(output), earlier=(f"x={upcycled}",), window=16)
    assert cli.run(wrong) == 2
    assert "x has other layers or experts" in capsys.readouterr().err


def test_routing_of_a_dense_model_is_an_error(model_directory, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    verb = Routing(str(model_directory), (str(tmp_path / "a.txt"),), str(tmp_path / "out"))
    assert cli.run(verb) == 2
    assert "is dense" in capsys.readouterr().err and not (tmp_path / "out").exists()
