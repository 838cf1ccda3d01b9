"""Whole tasks on models whose answers are known."""

import math

import jax.numpy as jnp
import pytest
from flax import nnx

from olmax.data.tokenizer import Tokenizer, train_bpe
from olmax.errors import UserError
from olmax.evaluation import scoring, suite
from olmax.evaluation.requests import read_task
from olmax.evaluation.scoring import Score
from olmax.evaluation.suite import Suite, encode_pairs, evaluate


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["Question: what? Answer: A. B. C. D. " * 3], vocab_size=300)


def task(data_dir, name):
    return read_task(data_dir / "olmes_requests" / name / "requests.jsonl.gz")


def test_a_uniform_model_has_chance_accuracy_and_log2_v_bits_per_token(data_dir, tokenizer, model):
    uniform = nnx.clone(model)
    uniform.head.kernel[...] = jnp.zeros_like(uniform.head.kernel[...])
    tasks = [task(data_dir, name) for name in ("arc_easy/val_mc_5shot", "gsm8k/gold_bpb_5shot")]
    results = Suite(tokenizer, tasks, limit=40)(uniform)
    arc, gsm8k = results.tasks
    assert arc.primary_metric == "acc_raw"
    # All labels are one token, so all choices tie.
    assert arc.primary.value == pytest.approx(arc.metrics["chance"].value)
    assert arc.primary.value == pytest.approx(0.25, abs=0.01)
    assert gsm8k.primary_metric == "bits_per_byte" and gsm8k.questions == 40
    rates = []
    for question in tasks[1].questions[:: len(tasks[1].questions) // 40][:1]:
        text = question.choices[0].continuation
        rates.append(len(tokenizer.encode(text)) / len(text.encode()))
    (first,) = Suite(tokenizer, [tasks[1]], limit=1)(uniform).tasks
    assert first.primary.value == pytest.approx(math.log2(320) * rates[0], rel=1e-5)


@pytest.mark.parametrize(
    "name", ["arc_challenge/val_mc_5shot", "csqa/val_rc_5shot", "winogrande/val_rc_5shot"]
)
def test_a_scorer_that_likes_the_right_answer_gets_everything(
    data_dir, tokenizer, model, monkeypatch, name
):
    wanted = task(data_dir, name)
    right = {(q.choices[q.gold].context, q.choices[q.gold].continuation) for q in wanted.questions}
    ids = {(tuple(c), tuple(t)) for c, t in encode_pairs(tokenizer, sorted(right))}

    def rigged(model, pairs, **kwargs):
        return [
            Score(-1.0 if (tuple(c), tuple(t)) in ids else -500.0 * len(t), len(t), False)
            for c, t in pairs
        ]

    monkeypatch.setattr(scoring, "score", rigged)
    (result,) = Suite(tokenizer, [wanted], limit=60)(model).tasks
    assert result.primary.value == 1.0 and result.primary.stderr == 0.0


def test_unconditional_requests_are_scored_for_pmi_alone(data_dir, tokenizer, model, monkeypatch):
    seen = []
    real = scoring.score

    def counting(model, pairs, **kwargs):
        seen.append(len(pairs))
        return real(model, pairs, **kwargs)

    monkeypatch.setattr(scoring, "score", counting)
    rc = task(data_dir, "arc_easy/val_rc_5shot")
    choices = sum(len(q.choices) for q in rc.questions[:: len(rc.questions) // 8][:8])
    (plain,) = Suite(tokenizer, [rc], limit=8)(model).tasks
    (pmi,) = Suite(tokenizer, [rc], limit=8, pmi=True)(model).tasks
    assert seen == [choices, 2 * choices]
    assert "acc_uncond" not in plain.metrics and "acc_uncond" in pmi.metrics
    assert pmi.metrics["acc_per_char"] == plain.metrics["acc_per_char"]


def test_results_as_json_table_and_in_the_training_loop(data_dir, tokenizer, model, monkeypatch):
    monkeypatch.setenv("OLMAX_DATA_DIR", str(data_dir))
    names = ["copycolors/10way", "boolq/val_mc_5shot"]
    results = evaluate(model, tokenizer, names, limit=6)
    found = results.to_json()
    assert list(found["tasks"]) == ["copycolors_10way", "boolq_val_mc_5shot"]
    assert found["tasks"]["copycolors_10way"]["questions"] == 6
    values = [result.primary.value for result in results.tasks]
    assert found["averages"]["accuracy_macro"].value == pytest.approx(sum(values) / 2)
    texts = [" ".join(row) for row in results.table().texts()]
    assert "copycolors_10way acc_raw 6" in texts[0] and "±" in texts[0]
    assert texts[2].startswith("accuracy_macro")
    loop = Suite(tokenizer, suite.requests.read_tasks(names), limit=6).in_loop(model)
    assert loop["copycolors_10way/acc_raw"] == values[0]
    assert "boolq_val_mc_5shot/bits_per_byte" in loop


def test_a_limit_below_one_is_refused(tokenizer):
    with pytest.raises(UserError, match="limit 0"):
        Suite(tokenizer, [], limit=0)
