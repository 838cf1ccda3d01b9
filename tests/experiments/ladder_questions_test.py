"""Questions for very small models: well-formed, distinct, and the right choice is the true one."""

import pytest

from experiments.ladder.questions import CHOICES, DESCRIPTIONS, tasks, write_questions
from olmax.data import corpus as embedded
from olmax.evaluation.requests import read_tasks


@pytest.fixture(scope="module")
def held_out():
    names = ("arithmetic", "docs", "code")
    return {n: [d.text for d in embedded.source(n, split="held_out").read()] for n in names}


def test_every_task_has_its_questions(held_out):
    made = tasks(held_out, 60)
    assert set(made) == set(DESCRIPTIONS)
    for questions in made.values():
        assert len(questions) == 60
        for _, choices, gold in questions:
            assert len(set(choices)) == CHOICES and 0 <= gold < CHOICES
        # Right choices stand everywhere.
        assert len({gold for _, _, gold in questions}) == CHOICES


def test_the_right_choice_continues_its_text(held_out):
    made = tasks(held_out, 40)
    for name, source in (("docs_order_rc", "docs"), ("code_order_rc", "code")):
        for context, choices, gold in made[name]:
            assert any(context + choices[gold] in text for text in held_out[source])
            for wrong in choices[:gold] + choices[gold + 1 :]:
                assert sorted(wrong) == sorted(choices[gold])
    for name in ("sums_rc", "stories_rc"):
        for context, choices, gold in made[name]:
            text = f"{context}{choices[gold]}\n####"
            assert any(problem.startswith(text) for problem in held_out["arithmetic"])
            assert len({len(choice) for choice in choices}) == 1


def test_files_are_read_by_the_evaluation(tmp_path):
    write_questions(tmp_path, 5, seed=0)
    found = {task.name: task for task in read_tasks([tmp_path])}
    assert set(found) == set(DESCRIPTIONS)
    assert all(len(task.questions) == 5 and task.has_choices for task in found.values())
