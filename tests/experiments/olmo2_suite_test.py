"""The generated benchmark: answerable, fair, in OLMES format, and from held-out text alone."""

import json
import re

import pytest

from experiments.olmo2 import suite
from experiments.olmo2.recipe import Evaluation
from olmax.data import corpus
from olmax.evaluation.requests import read_tasks


@pytest.fixture(scope="module")
def held_out():
    return {
        name: [document.text for document in corpus.source(name, split="held_out").read()]
        for name in ("arithmetic", "code")
    } | {"docs": [_prose(number) for number in range(30)]}


def _prose(number: int) -> str:
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    picked = (words[(number * 7 + i * i) % 6] + str((number * i) % 97) for i in range(200))
    return " ".join(picked)


@pytest.fixture(scope="module")
def tasks(held_out):
    return suite.tasks(held_out, Evaluation(questions=60))


def _questions(rows):
    grouped = {}
    for row in rows:
        grouped.setdefault(row["doc_id"], []).append(row)
    return list(grouped.values())


def test_every_task_is_full_and_described(tasks):
    assert set(tasks) == set(suite.METRICS) == set(suite.DESCRIPTIONS)
    for name, rows in tasks.items():
        questions = _questions(rows)
        assert len(questions) == 60, name
        for question in questions:
            choices = [row["request"]["continuation"] for row in question]
            assert len(set(choices)) == suite.CHOICES, (name, choices)
            assert len({row["request"]["context"] for row in question}) == 1
            assert [row["idx"] for row in question] == [0, 1, 2, 3]
            assert len({row["label"] for row in question}) == 1


def test_right_answers_are_spread_over_the_places(tasks):
    for name, rows in tasks.items():
        places = [question[0]["label"] for question in _questions(rows)]
        assert min(places.count(i) for i in range(4)) >= 5, name


def test_arithmetic_answers_are_right_and_the_others_wrong(tasks):
    for question in _questions(tasks["arithmetic_rc"]):
        asked = question[0]["request"]["context"].rpartition("Question: ")[2]
        expression = re.search(r"What is (.*)\?", asked)[1]
        value = eval(expression)
        results = [int(row["request"]["continuation"].rpartition("#### ")[2]) for row in question]
        assert [r == value for r in results].count(True) == 1
        assert results.index(value) == question[0]["label"]


def test_lettered_answers_are_right(tasks):
    for question in _questions(tasks["arithmetic_mc"]):
        asked = question[0]["request"]["context"].rpartition("Question: ")[2]
        value = eval(re.search(r"What is (.*)\?", asked)[1])
        letter = re.search(rf" ([A-D])\. {value:.0f}\n", asked)[1]
        assert question[question[0]["label"]]["request"]["continuation"] == f" {letter}"


def test_colors_are_those_that_were_said(tasks):
    for question in _questions(tasks["copy_colors_rc"]):
        context = question[0]["request"]["context"]
        name = re.search(r"The (\w+) is$", context)[1]
        color = question[question[0]["label"]]["request"]["continuation"].strip(" .")
        assert f"The {name} is {color}." in context


def test_identifiers_continue_the_file_they_are_from(tasks, held_out):
    for question in _questions(tasks["code_identifiers_rc"]):
        row = question[question[0]["label"]]
        text = row["request"]["context"] + row["request"]["continuation"]
        assert any(text in document for document in held_out["code"])
        names = [r["request"]["continuation"].strip() for r in question]
        assert all(re.search(rf"\b{n}\b", row["request"]["context"]) for n in names)


def test_cloze_answer_continues_its_passage(tasks, held_out):
    for question in _questions(tasks["docs_cloze_rc"]):
        row = question[question[0]["label"]]
        text = row["request"]["context"] + row["request"]["continuation"]
        assert any(text in document for document in held_out["docs"])


def test_questions_come_from_no_training_document(tasks):
    questions = set()
    for document in corpus.source("arithmetic", split="train").read():
        questions.add(document.text.partition("\n")[0])
    for name in ("arithmetic_rc", "word_problems_rc"):
        for question in _questions(tasks[name]):
            asked = question[0]["request"]["context"].rpartition("\nAnswer:")[0]
            assert asked.rpartition("\n")[2] not in questions


def test_same_seed_same_questions_and_another_seed_others(held_out):
    first = suite.tasks(held_out, Evaluation(questions=5))
    assert first == suite.tasks(held_out, Evaluation(questions=5))
    other = suite.tasks(held_out, Evaluation(questions=5, seed=1))
    assert all(first[name] != other[name] for name in first)


def test_files_are_read_by_the_evaluation(tasks, tmp_path):
    for name, rows in tasks.items():
        task, _, variant = name.rpartition("_")
        folder = tmp_path / task / variant
        folder.mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "requests.jsonl").write_text(text)
    found = read_tasks([tmp_path])
    assert {task.name for task in found} == set(tasks)
    assert all(len(task.questions) == 60 and task.has_choices for task in found)
