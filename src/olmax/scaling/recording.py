"""What a training run of ours writes down, in the format of the released ladder runs.

`InLoop` is an evaluator of the trainer; `write_run` turns the metrics of a finished run into the
CSV that `read_run` reads, so that own and released runs go through the same fit.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath

from olmax.errors import UserError
from olmax.evaluation.metrics import ScoredQuestion, bits_per_byte
from olmax.evaluation.requests import Question
from olmax.evaluation.suite import Suite
from olmax.models.decoder import Decoder
from olmax.reporting.files import write_text
from olmax.scaling.runs import BATCH, FLOPS_PER_TOKEN, PARAMETERS, STEP, TOKENS

EVALUATOR = "eval"
"""Name of the evaluator in the trainer's metrics; with it the metrics have the columns' names."""
LEARNING_RATE = "learning_rate_peak"


def released_metrics(
    questions: Sequence[Question], scored: Sequence[ScoredQuestion]
) -> dict[str, float]:
    """Metrics of one task as the released runs define them.

    The leading space of a continuation counts in no length. `bpb`: bits per UTF-8 byte of the right
    answer. `len_norm`: share of questions whose right answer has the highest log-likelihood per
    character (the first one wins a tie). `soft_log`: log softmax of those quotients at the right
    answer; its negative is TaskCE. All are means over the questions.

    Args:
      questions: their texts.
      scored: their log-likelihoods, in the same order.
    """
    bits, right, soft = [], [], []
    for question, found in zip(questions, scored, strict=True):
        texts = [choice.continuation.removeprefix(" ") for choice in question.choices]
        per_character = np.array(
            [
                choice.logprob / max(len(text), 1)
                for choice, text in zip(found.choices, texts, strict=True)
            ]
        )
        gold = found.gold
        bits.append(bits_per_byte(-found.choices[gold].logprob, max(len(texts[gold].encode()), 1)))
        right.append(int(np.argmax(per_character)) == gold)
        soft.append(per_character[gold] - np.logaddexp.reduce(per_character))
    return {
        "bpb": float(np.mean(bits)),
        "len_norm": float(np.mean(right)),
        "soft_log": float(np.mean(soft)),
    }


class InLoop:
    """Evaluates a model in the training loop; see `released_metrics`."""

    def __init__(self, suite: Suite, *, batch_tokens: int = 16384):
        """
        Args:
          suite: tasks with several choices a question.
          batch_tokens: of a forward pass.

        Raises:
          UserError: a task has no choices, so there is no accuracy.
        """
        for task in suite.tasks:
            if not task.has_choices:
                raise UserError(
                    f"{task.path}: questions with one reference answer have no accuracy; a ladder "
                    "needs tasks with choices"
                )
        self._suite = suite
        self._batch_tokens = batch_tokens

    def __call__(self, model: Decoder) -> dict[str, float]:
        """`downstream_bpb/<task>_bpb`, `downstream/<task>_len_norm` and
        `downstream_soft_log/<task>_soft_log` of every task.
        """
        scored = self._suite.score(model, batch_tokens=self._batch_tokens)
        found = {}
        for task, questions, results in zip(
            self._suite.tasks, self._suite.questions, scored, strict=True
        ):
            metrics = released_metrics(questions, results)
            found[f"downstream_bpb/{task.name}_bpb"] = metrics["bpb"]
            found[f"downstream/{task.name}_len_norm"] = metrics["len_norm"]
            found[f"downstream_soft_log/{task.name}_soft_log"] = metrics["soft_log"]
        return found


def write_run(
    metrics: epath.PathLike,
    output: epath.PathLike,
    *,
    batch_tokens: int,
    learning_rate: float,
    parameters: int,
    flops_per_token: float,
) -> pd.DataFrame:
    """Writes the CSV of a run, one row per evaluation, and returns it as a table.

    Args:
      metrics: the trainer's metrics.jsonl.
      output: CSV to write.
      batch_tokens: tokens of an update.
      learning_rate: peak.
      parameters: N, without the input embedding.
      flops_per_token: of training.

    Raises:
      UserError: the metrics hold no evaluation, or one that is not finite.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in epath.Path(metrics).read_text().splitlines():
        record = json.loads(line)
        values = {k: v for k, v in record.items() if k.startswith(f"{EVALUATOR}/downstream")}
        if not values:
            continue
        for name, value in values.items():
            if value is None or not math.isfinite(value):
                raise UserError(f"{metrics}: {name} is {value} at step {record['step']}")
        rows.setdefault(int(record["step"]), {}).update(values)
    if not rows:
        raise UserError(
            f"{metrics}: no evaluations {EVALUATOR}/downstream...; was the run trained?"
        )
    table = pd.DataFrame(
        [
            {STEP: step, **values, TOKENS: float(step * batch_tokens), BATCH: batch_tokens}
            for step, values in sorted(rows.items())
        ]
    ).assign(
        **{LEARNING_RATE: learning_rate, PARAMETERS: parameters, FLOPS_PER_TOKEN: flops_per_token}
    )
    write_text(output, table.to_csv(index=False))
    return table
