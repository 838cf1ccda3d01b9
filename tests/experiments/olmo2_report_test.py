"""Comparison and report from made-up results: the text follows the numbers."""

import copy
import io
import json

import numpy as np
import pytest
from rich.console import Console

from experiments.olmo2 import comparison, figures, microanneal, stability, suite
from experiments.olmo2.presets import get_recipe
from experiments.olmo2.report import write_report
from olmax.data.documents import Document, DocumentSource
from olmax.data.prepared import prepare
from olmax.data.tokenizer import train_bpe

SOURCES = ("arithmetic", "code", "docs", "tests")
ANNEALED = ("arithmetic", "code", "docs")
NAMES = ("ingredient1", "ingredient2", "ingredient3")


def _result(rng, *, bits: dict[str, float], accuracy: float, math_accuracy: float, answers):
    """Results whose documents and questions are the same for every model, up to small noise."""
    base = np.random.default_rng(0)
    sizes = {name: base.integers(500, 2000, 30) for name in SOURCES}
    hardness = {task: base.random(100) for task in suite.METRICS}
    return {
        "sources": {
            name: {
                "bits": (size * (bits[name] + rng.normal(0, 0.01, 30))).tolist(),
                "bytes": size.tolist(),
            }
            for name, size in sizes.items()
        },
        "tasks": {
            task: {
                "metric": metric,
                "correct": (
                    hardness[task]
                    < (math_accuracy if task in suite.MATH_TASKS else accuracy)
                ).astype(float).tolist(),
                "bits_per_byte": (
                    answers[task in suite.MATH_TASKS] + hardness[task] + rng.normal(0, 0.01, 100)
                ).tolist(),
                "chance": [0.25] * 100,
            }
            for task, metric in suite.METRICS.items()
        },
        "samples": [{"prompt": "1 + 1 =", "text": " <b>2</b>"}],
    }  # fmt: skip


def _results(change: float = -0.2, math: float = -0.5, soup: float = -0.02, gain: float = 0.2):
    rng = np.random.default_rng(1)
    flat = dict.fromkeys(SOURCES, 2.0)
    annealed = dict.fromkeys(SOURCES, 2.0 + change) | {"arithmetic": 2.0 + math}
    cooked = {n: value + soup for n, value in annealed.items()}
    return {
        "pretrained": _result(rng, bits=flat, accuracy=0.5, math_accuracy=0.5, answers=(2.0, 2.0)),
        **{
            name: _result(
                rng,
                bits=annealed,
                accuracy=0.52,
                math_accuracy=0.52 + gain,
                answers=(2.0 + change, 2.0 + math),
            )
            for name in NAMES
        },
        "soup": _result(
            rng,
            bits=cooked,
            accuracy=0.52,
            math_accuracy=0.52 + gain,
            answers=(2.0 + change + soup, 2.0 + math + soup),
        ),
    }


def _verdicts(results) -> list[str]:
    return [finding.verdict for finding in comparison.findings(results, ANNEALED)]


def test_findings_of_a_run_like_the_papers():
    assert _verdicts(_results()) == ["shown"] * 8


def test_findings_follow_the_numbers_the_other_way():
    results = _results(change=0.2, math=0.5, soup=0.02, gain=-0.25)
    assert _verdicts(results) == ["reversed"] * 8


def test_accuracy_is_not_judged_where_every_model_guesses():
    results = _results()
    for result in results.values():
        for task in result["tasks"].values():
            task["correct"] = ([1.0, 0.0, 0.0, 0.0] * 25)[: len(task["correct"])]
    finding = comparison.findings(results, ANNEALED)[2]
    assert finding.verdict == "not shown" and "above guessing on any task" in finding.evidence


def test_nothing_is_shown_where_nothing_differs():
    results = _results()
    same = {name: copy.deepcopy(results["pretrained"]) for name in results}
    assert set(_verdicts(same)) == {"not shown"}


def test_evidence_carries_difference_and_standard_error():
    results = _results()
    mean = comparison.mean_result([results[name] for name in NAMES])
    change = comparison.average_bits_change(results["pretrained"], mean, ANNEALED)
    assert change.value == pytest.approx((-0.2 * 2 - 0.5) / 3, abs=0.02)
    evidence = comparison.findings(results, ANNEALED)[0].evidence
    assert evidence.startswith(change.text(3, signed=True))


def test_best_ingredient_is_the_one_with_fewest_bits():
    results = _results()
    for source in results["ingredient2"]["sources"].values():
        source["bits"] = [bits * 0.9 for bits in source["bits"]]
    assert comparison.best_ingredient(results, ANNEALED) == "ingredient2"
    assert _verdicts(results)[6] == "reversed"


def _write_metrics(directory, steps: int, per_step: int, seed: int) -> None:
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        loss = 4 + 3 * np.exp(-step / 20) + rng.normal(0, 0.05)
        rows.append(
            {"step": step, "tokens": step * per_step, "loss": loss, "cross_entropy": loss,
             "grad_norm": 1 + rng.random(), "learning_rate": 1e-3 * (1 - step / (steps + 1)),
             "tokens_per_second": 9000.0 if step % 10 == 0 else None}
        )  # fmt: skip
        if step % 20 == 0:
            rows.append({"step": step} | {f"held_out/{name}": 2 + 5 / step for name in SOURCES})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run_directory(tmp_path):
    """A run directory as the stages leave it, without models."""
    tokenizer = train_bpe(["some text to train on " * 20], vocab_size=270)
    sources = [
        DocumentSource(n, n, lambda n=n: [Document("some text " * 50, n, n)]) for n in SOURCES
    ]
    prepare(sources, tokenizer, tmp_path / "data", sequence_length=8, progress=False)
    _write_metrics(tmp_path / "pretrain", 100, 4096, 0)
    for number, name in enumerate(NAMES):
        _write_metrics(tmp_path / "anneal" / name, 40, 4096, number + 1)
    return tmp_path


def _write(directory, results) -> str:
    out = io.StringIO()
    seconds = {"prepare": 20.0, "pretrain": 300.0, "evaluate": 40.0}
    recipe = get_recipe("tiny")
    write_report(recipe, directory, results, seconds, Console(file=out, width=120))
    return out.getvalue()


def test_report_of_a_made_up_run(run_directory):
    printed = _write(run_directory, _results())
    page = (run_directory / "report.html").read_text()
    numbers = json.loads((run_directory / "report.json").read_text())
    change = comparison.average_bits_change(
        _results()["pretrained"], _results()["soup"], ANNEALED
    ).text(3, signed=True)
    assert change in printed and change in page
    assert "&lt;b&gt;2&lt;/b&gt;" in page and "<b>2</b>" not in page
    assert page.count("<img") == 4
    assert "6.0 min" in page
    for text in ("OLMo 2 13B", "GSM*", "ingredient3", "Resolved configuration", "62.6"):
        assert text in page, text
    assert numbers["training"]["ingredient2"]["steps"] == 40
    assert numbers["seconds"]["pretrain"] == 300.0
    assert numbers["bits_per_byte"]["soup"]["docs"]["n"] == 30
    assert numbers["environment"]["versions"]["jax"]
    assert numbers["recipe"]["pretrain"]["seed"] == 6198
    assert [i["seed"] for i in numbers["plan"]["ingredients"]] == [42, 42069, 666]
    verdicts = [finding["verdict"] for finding in numbers["findings"]]
    assert verdicts == _verdicts(_results())
    assert page.count('verdict shown"') == 8


def test_main_figure_is_small_and_drawn_from_the_json(run_directory):
    _write(run_directory, _results())
    path = figures.write_main_figure(run_directory / "report.json", run_directory / "x.png")
    assert path.read_bytes() == (run_directory / "main.png").read_bytes()
    assert 20_000 < len(path.read_bytes()) < 120_000


def test_studies_are_part_of_the_report(run_directory):
    results = _results()
    study = {
        "tokens": 1000,
        "mixes": {"math_35": {"docs": 0.65, "arithmetic": 0.35}},
        "evaluation": {"not annealed": results["pretrained"], "math_35": results["soup"]},
    }
    exponents = {
        "layers": 8,
        "documents": 50,
        "rows": [
            {"width": 64, "init": "normal", "activations": 0.01, "gradients": -0.5},
            {"width": 64, "init": "scaled", "activations": -0.2, "gradients": 0.4},
        ],
    }
    for name, content in ((microanneal.DIRECTORY, study), (stability.DIRECTORY, exponents)):
        (run_directory / name).mkdir()
        (run_directory / name / "results.json").write_text(json.dumps(content))
    _write(run_directory, results)
    page = (run_directory / "report.html").read_text()
    assert "TinyGSM-MIND" in page and "math_35" in page
    assert "At 1 of 1 widths" in page and "at 0 of 1 that of gradients" in page
