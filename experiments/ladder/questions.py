"""Tasks for models of ten thousand to a few hundred thousand parameters, in OLMES's request format.

Choosing among results of calculations, or among passages, is guessing for such models. These four
tasks ask for less, and their accuracy moves while the loss still falls fast: which order of the
same words, symbols or numbers is the true one.
"""

import itertools
import json
import pathlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from olmax.data import corpus as embedded
from olmax.reporting.files import write_json, write_text

SOURCES = ("arithmetic", "docs", "code")
CHOICES = 4
DESCRIPTIONS = {
    "sums_rc": "which places the numbers have in the worked solution of a sum or product",
    "stories_rc": "the same for word problems",
    "docs_order_rc": "in which order some words continue a passage of documentation",
    "code_order_rc": "in which order some symbols continue a line of code",
}
"""What each task asks."""

Question = tuple[str, list[str], int]
"""Context, choices and the index of the right one."""


def write_questions(directory: pathlib.Path, count: int, seed: int) -> None:
    """Writes `<task>/<variant>/requests.jsonl` of every task.

    Args:
      directory: of the request files.
      count: questions of each task.
      seed: of the texts that are held out; the same as in training.
    """
    held_out = {
        name: [d.text for d in embedded.source(name, split="held_out", seed=seed).read()]
        for name in SOURCES
    }
    for name, questions in tasks(held_out, count).items():
        rows = [row for number, q in enumerate(questions) for row in _rows(name, number, q)]
        task, _, variant = name.rpartition("_")
        folder = directory / task / variant
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / "requests.jsonl", text)
        config = {"primary_metric": "acc_per_char"}
        write_json(folder / "config.json", {"task_name": name, "task_config": config})


def tasks(held_out: Mapping[str, Sequence[str]], count: int) -> dict[str, list[Question]]:
    """Questions of every task from held-out documents of `SOURCES`."""
    problems = [_parse(text) for text in held_out["arithmetic"]]
    sums = [p for p in problems if p[0].startswith("What is")]
    stories = [p for p in problems if not p[0].startswith("What is")]
    makers = {
        "sums_rc": lambda rng: _places(sums, rng),
        "stories_rc": lambda rng: _places(stories, rng),
        "docs_order_rc": lambda rng: _orders(held_out["docs"], _WORDS, rng),
        "code_order_rc": lambda rng: _orders(held_out["code"], _SYMBOLS, rng),
    }
    return {
        name: list(itertools.islice(make(random.Random(name)), count))
        for name, make in makers.items()
    }


def _rows(task: str, number: int, question: Question) -> list[dict[str, Any]]:
    context, choices, gold = question
    return [
        {
            "request_type": "loglikelihood",
            "doc": {"id": number, "query": context, "choices": choices, "gold": gold},
            "request": {"context": context, "continuation": choice},
            "idx": index,
            "task_name": task,
            "doc_id": number,
            "native_id": f"{task}-{number}",
            "label": gold,
        }
        for index, choice in enumerate(choices)
    ]


def _parse(problem: str) -> tuple[str, str]:
    """Question and worked answer of a generated problem."""
    match = re.fullmatch(r"Question: (.*)\nAnswer: (.*)\n#### \d+\n", problem, re.DOTALL)
    assert match is not None, problem
    return match[1], match[2]


def _shuffled(right: str, wrong: Sequence[str], rng: random.Random) -> tuple[list[str], int]:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return choices, choices.index(right)


def _places(problems: Sequence[tuple[str, str]], rng: random.Random) -> Iterator[Question]:
    """A calculation with its solution among those where the numbers change places."""
    problems = list(dict.fromkeys(problems))
    rng.shuffle(problems)
    for question, answer in problems:
        parts = re.split(r"(\d+)", answer)
        numbers = parts[1::2]
        if not 3 <= len(numbers) <= 6:
            continue
        orders = {
            "".join([*itertools.chain(*zip(parts[::2], order, strict=False)), parts[-1]])
            for order in itertools.permutations(numbers)
        }
        wrong = sorted(orders - {answer})
        if len(wrong) < CHOICES - 1:
            continue
        chosen = [f" {text}" for text in rng.sample(wrong, CHOICES - 1)]
        choices, gold = _shuffled(f" {answer}", chosen, rng)
        yield f"Question: {question}\nAnswer:", choices, gold


_WORDS = re.compile(r"\s+\S+")
_SYMBOLS = re.compile(r"[ \t]*(?:\w+|[^\w\s])")
_CONTEXT, _PIECES = 120, 5


def _orders(
    documents: Sequence[str], pieces: re.Pattern[str], rng: random.Random
) -> Iterator[Question]:
    """A passage and what follows it, among the same pieces in other orders."""
    starts = [
        (number, start)
        for number, text in enumerate(documents)
        for start in range(0, max(0, len(text) - 400), 400)
    ]
    rng.shuffle(starts)
    for number, start in starts:
        text = documents[number]
        begin = text.find("\n", start) + 1
        cut = re.compile(r"\s").search(text, begin + _CONTEXT)
        if not begin or cut is None:
            continue
        found, at = [], cut.start()
        while len(found) < _PIECES and (match := pieces.match(text, at)):
            found.append(match[0])
            at = match.end()
        if len(found) < _PIECES or any("\n" in piece for piece in found):
            continue
        right = "".join(found)
        orders = {"".join(order) for order in itertools.permutations(found)} - {right}
        if len(orders) < CHOICES - 1 or not re.search(r"[a-z]{3}", right):
            continue
        choices, gold = _shuffled(right, rng.sample(sorted(orders), CHOICES - 1), rng)
        yield text[begin : cut.start()], choices, gold
