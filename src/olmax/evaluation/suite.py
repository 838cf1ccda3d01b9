"""Running tasks on a model: stand-alone with a table, or in the training loop."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.evaluation import metrics, requests, scoring
from olmax.evaluation.metrics import ScoredChoice, ScoredQuestion
from olmax.models.decoder import Decoder
from olmax.reporting.estimates import Estimate
from olmax.reporting.tables import Column, Table


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Metrics of one task."""

    task: str
    primary_metric: str
    questions: int
    metrics: dict[str, Estimate]

    @property
    def primary(self) -> Estimate:
        """The metric that the task is judged by."""
        return self.metrics[self.primary_metric]


@dataclasses.dataclass(frozen=True)
class Results:
    """Metrics of all tasks, and their averages."""

    tasks: tuple[TaskResult, ...]

    def averages(self) -> dict[str, Estimate]:
        """Macro (over tasks) and micro (over questions) averages of the primary metrics.

        Accuracies and bits per byte are averaged apart. A kind with one task has none.
        """
        found = {}
        for kind in ("accuracy", "bits_per_byte"):
            mine = [
                result.primary
                for result in self.tasks
                if (result.primary_metric == "bits_per_byte") == (kind == "bits_per_byte")
            ]
            if len(mine) > 1:
                found[f"{kind}_macro"] = metrics.macro_average(mine)
                found[f"{kind}_micro"] = metrics.micro_average(mine)
        return found

    def to_json(self) -> dict[str, Any]:
        """`{tasks: {name: {primary_metric, questions, metrics}}, averages}`; every metric is
        `{value, stderr, n}`.
        """
        return {
            "tasks": {
                result.task: {
                    "primary_metric": result.primary_metric,
                    "questions": result.questions,
                    "metrics": result.metrics,
                }
                for result in self.tasks
            },
            "averages": self.averages(),
        }

    def table(self) -> Table:
        """A row a task: its primary metric with the standard error, guessing, bits per byte."""
        rows = []
        for result in self.tasks:
            chance = result.metrics.get("chance")
            rows.append(
                [
                    result.task,
                    result.primary_metric,
                    result.questions,
                    result.primary,
                    None if chance is None else chance.value,
                    result.metrics["bits_per_byte"],
                ]
            )
        for name, value in self.averages().items():
            rows.append([name, "", value.n, value, None, None])
        columns = [
            "task",
            Column("metric", align="left"),
            "questions",
            Column("value", digits=4),
            Column("chance", digits=4),
            Column("bits/byte", digits=4),
        ]
        return Table(columns, rows, caption="value ± standard error; accuracies as fractions of 1")


class Suite:
    """Tasks, tokenised once and run on any number of models."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tasks: Sequence[requests.Task],
        *,
        limit: int | None = None,
        pmi: bool = False,
    ):
        """Reads and tokenises.

        Args:
          tokenizer: of the models.
          tasks: see `requests.read_tasks`.
          limit: questions of each task, spread over its file; None: all.
          pmi: score the unconditional requests too, where there are any, for `acc_uncond`.

        Raises:
          UserError: `limit` below 1.
        """
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit} must be at least 1")
        self.tasks = list(tasks)
        self.prefix_id = scoring.prefix_token(tokenizer)
        self.questions = [requests.sample_questions(task, limit) for task in self.tasks]
        pairs: list[tuple[str, str]] = []
        for questions in self.questions:
            for choice in (choice for question in questions for choice in question.choices):
                pairs.append((choice.context, choice.continuation))
                if pmi and choice.unconditional_context is not None:
                    pairs.append((choice.unconditional_context, choice.continuation))
        self._pmi = pmi
        self._pairs = encode_pairs(tokenizer, pairs)

    def __call__(
        self,
        model: Decoder,
        *,
        batch_tokens: int = scoring.BATCH_TOKENS,
        mesh: Mesh | None = None,
        progress: bool = False,
    ) -> Results:
        """Scores everything; the arguments are those of `scoring.score`."""
        scored = self.score(model, batch_tokens=batch_tokens, mesh=mesh, progress=progress)
        results = []
        for task, questions in zip(self.tasks, scored, strict=True):
            primary = metrics.primary_metric(task.name, task.has_choices, task.settings)
            found = metrics.aggregate(questions)
            results.append(TaskResult(task.name, primary, len(questions), found))
        return Results(tuple(results))

    def score(
        self,
        model: Decoder,
        *,
        batch_tokens: int = scoring.BATCH_TOKENS,
        mesh: Mesh | None = None,
        progress: bool = False,
    ) -> list[list[ScoredQuestion]]:
        """The scored `questions` of every task; arguments are those of `scoring.score`."""
        scores = iter(
            scoring.score(
                model,
                self._pairs,
                batch_tokens=batch_tokens,
                prefix_id=self.prefix_id,
                mesh=mesh,
                progress=progress,
            )
        )
        return [
            [
                ScoredQuestion(
                    tuple(self._scored(choice, scores) for choice in question.choices),
                    question.gold,
                )
                for question in questions
            ]
            for questions in self.questions
        ]

    def in_loop(self, model: Decoder) -> dict[str, float]:
        """`<task>/<metric>` -> value: the primary metric and bits per byte of every task. Usable as
        an evaluator of the trainer.
        """
        found = {}
        for result in self(model).tasks:
            for name in dict.fromkeys((result.primary_metric, "bits_per_byte")):
                found[f"{result.task}/{name}"] = result.metrics[name].value
        return found

    def _scored(self, choice: requests.Choice, scores) -> ScoredChoice:
        score = next(scores)
        unconditional = None
        if self._pmi and choice.unconditional_context is not None:
            unconditional = next(scores).logprob
        text = choice.continuation
        return ScoredChoice(
            score.logprob, score.tokens, len(text), len(text.encode()), unconditional
        )


def evaluate(
    model: Decoder,
    tokenizer: Tokenizer,
    paths: Iterable[str | os.PathLike],
    *,
    limit: int | None = None,
    pmi: bool = False,
    batch_tokens: int = scoring.BATCH_TOKENS,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Results:
    """Runs the request files that `paths` name (see `requests.find_request_files`).

    Raises:
      UserError: see `requests.read_tasks`.
    """
    suite = Suite(tokenizer, requests.read_tasks(paths), limit=limit, pmi=pmi)
    return suite(model, batch_tokens=batch_tokens, mesh=mesh, progress=progress)


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation) texts, encoded apart; equal contexts only once."""
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    context_ids = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
    continuations = tokenizer.encode_batch([continuation for _, continuation in pairs])
    return [
        (context_ids[context], ids) for (context, _), ids in zip(pairs, continuations, strict=True)
    ]
