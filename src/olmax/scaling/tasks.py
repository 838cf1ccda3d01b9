"""Benchmark tasks of a ladder: which columns of a run table hold them, and their chance level.

Columns follow the released ladder runs (AllenAI's OLMo-ladder, second evaluation):
`eval/downstream_bpb/<split>_rc_5shot_bpb` holds the task loss (bits per byte of the gold answer),
`eval/downstream/<split>_rc_5shot_len_norm` the accuracy and `eval/downstream_soft_log/...` the mean
log-probability of the gold option among the options (its negative is TaskCE).
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from olmax.errors import UserError

Metric = Literal["task_loss", "c4", "task_ce", "rc_accuracy", "mc_accuracy"]
"""What is read from a run: bits per byte of the gold answer; nats per token on C4; cross-entropy
over the options; accuracy with the options' texts (RC) or with their letters (MC)."""

C4_COLUMN = "eval/c4_en-validation/CrossEntropyLoss"

MMLU_WEIGHTS = {"stem": 0.215, "humanities": 0.335, "social_sciences": 0.219, "other": 0.231}
"""Rounded shares of MMLU's questions that the paper averages its four groups with."""


@dataclasses.dataclass(frozen=True)
class Task:
    """One benchmark: a weighted mean of columns per metric."""

    name: str
    """As on the command line and in results."""
    title: str
    chance: float
    """Accuracy of guessing."""
    loss_columns: tuple[str, ...]
    accuracy_columns: tuple[str, ...]
    soft_log_columns: tuple[str, ...] = ()
    mc_columns: tuple[str, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    """One per column, normalised when averaged."""

    def columns(self, metric: Metric) -> tuple[str, ...]:
        """Columns that `metric` is averaged from.

        Raises:
          UserError: the task does not record this metric.
        """
        columns = {
            "task_loss": self.loss_columns,
            "c4": (C4_COLUMN,),
            "task_ce": self.soft_log_columns,
            "rc_accuracy": self.accuracy_columns,
            "mc_accuracy": self.mc_columns,
        }[metric]
        if not columns:
            raise UserError(f"task {self.name}: no columns known for the metric {metric}")
        return columns


def _released(name: str, title: str, chance: float, accuracy: str = "len_norm") -> Task:
    return Task(
        name=name,
        title=title,
        chance=chance,
        loss_columns=(f"eval/downstream_bpb/{name}_rc_5shot_bpb",),
        accuracy_columns=(f"eval/downstream/{name}_rc_5shot_{accuracy}",),
        soft_log_columns=(f"eval/downstream_soft_log/{name}_rc_5shot_soft_log",),
        mc_columns=(f"eval/downstream/{name}_mc_5shot_acc",),
    )


def _mmlu(split: str) -> Task:
    groups = [f"mmlu_{group}_{split}" for group in MMLU_WEIGHTS]
    return Task(
        name="mmlu" if split == "test" else f"mmlu_{split}",
        title="MMLU" if split == "test" else f"MMLU ({split})",
        chance=0.25,
        loss_columns=tuple(f"eval/downstream_bpb/{g}_rc_5shot_bpb" for g in groups),
        accuracy_columns=tuple(f"eval/downstream/{g}_rc_5shot_len_norm" for g in groups),
        soft_log_columns=tuple(f"eval/downstream_soft_log/{g}_rc_5shot_soft_log" for g in groups),
        mc_columns=tuple(f"eval/downstream/{g}_mc_5shot_len_norm" for g in groups),
        weights=tuple(MMLU_WEIGHTS.values()),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _mmlu("test"),
        _released("hellaswag_val", "HellaSwag", 0.25),
        _released("arc_challenge_test", "ARC-Challenge", 0.25),
        _released("arc_easy_test", "ARC-Easy", 0.25),
        _released("piqa_val", "PIQA", 0.5),
        _released("csqa_val", "CommonsenseQA", 0.2),
        _released("socialiqa_val", "Social IQa", 1 / 3),
        _released("openbookqa_test", "OpenBookQA", 0.25),
        _released("boolq_val", "BoolQ", 0.5, accuracy="acc"),
        _released("winogrande_val", "Winogrande", 0.5),
        _mmlu("val"),
        _released("arc_challenge_val", "ARC-Challenge (val)", 0.25),
        _released("arc_easy_val", "ARC-Easy (val)", 0.25),
        _released("openbookqa_val", "OpenBookQA (val)", 0.25),
    )
}
"""Tasks of the released runs by name; the first eight are the paper's."""

MAIN_TASKS: tuple[str, ...] = tuple(TASKS)[:8]

_LOSS = re.compile(r"eval/downstream_bpb/(?P<name>.+?)(?:_rc(?:_\d+shot)?)?_bpb$")


def find_tasks(columns: Iterable[str], chances: dict[str, float] | None = None) -> tuple[Task, ...]:
    """Tasks that a run table holds.

    The paper's eight when all their columns are there; else every task whose task loss and accuracy
    columns are found by their names, with the chance levels of `chances` (0.25 when not given).
    """
    present = list(columns)
    known = set(present)
    if set(_needed(TASKS[name] for name in MAIN_TASKS)) <= known:
        return tuple(TASKS[name] for name in MAIN_TASKS)
    found = []
    for column in present:
        match = _LOSS.match(column)
        if not match:
            continue
        stem = column.removeprefix("eval/downstream_bpb/").removesuffix("_bpb")
        accuracy = [
            f"eval/downstream/{stem}_{ending}"
            for ending in ("len_norm", "acc")
            if f"eval/downstream/{stem}_{ending}" in known
        ]
        if not accuracy:
            continue
        name = match["name"]
        soft = f"eval/downstream_soft_log/{stem}_soft_log"
        released = TASKS.get(name)
        chance = (chances or {}).get(name, released.chance if released else 0.25)
        found.append(
            Task(
                name=name,
                title=released.title if released else name.replace("_", " "),
                chance=chance,
                loss_columns=(column,),
                accuracy_columns=(accuracy[0],),
                soft_log_columns=(soft,) if soft in known else (),
            )
        )
    return tuple(found)


def get_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """Released tasks by name.

    Raises:
      UserError: a name is unknown.
    """
    for name in names:
        if name not in TASKS:
            raise UserError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return tuple(TASKS[name] for name in names)


def _needed(tasks: Iterable[Task]) -> list[str]:
    return [c for task in tasks for c in (*task.loss_columns, *task.accuracy_columns)]
