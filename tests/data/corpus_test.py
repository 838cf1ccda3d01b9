import re

import pytest

from olmax.data import corpus
from olmax.data.arithmetic import problem
from olmax.errors import UserError


@pytest.mark.parametrize("name", ["code", "docs", "arithmetic"])
def test_splits_are_disjoint_and_cover_enough(name):
    train = list(corpus.source(name).read())
    held_out = list(corpus.source(name, split="held_out").read())
    texts = {d.text for d in train}
    assert len(texts) == len(train)
    assert texts.isdisjoint(d.text for d in held_out)
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.1
    assert {d.source for d in train} == {name}
    assert sum(len(d.text) for d in train) > 3e6
    assert sum(len(d.text) for d in held_out) > 1e5
    assert [d.id for d in corpus.source(name, split="held_out").read()] == [d.id for d in held_out]


def test_fingerprints_differ_with_what_is_read():
    sources = [
        corpus.source("code"),
        corpus.source("code", split="held_out"),
        corpus.source("tests"),
        corpus.source("docs"),
        corpus.source("arithmetic"),
        corpus.source("arithmetic", seed=1),
        corpus.source("arithmetic", arithmetic_documents=10),
    ]
    assert len({s.fingerprint for s in sources}) == len(sources)
    assert corpus.source("code").fingerprint == sources[0].fingerprint


def test_docs_are_prose():
    ids = {d.id for d in corpus.source("docs").read()}
    assert any(i.startswith("python/") for i in ids)
    assert any(i.startswith("numpy/") for i in ids)


def test_unknown_names():
    with pytest.raises(UserError, match="there are code, tests, docs, arithmetic"):
        corpus.source("web")
    with pytest.raises(UserError, match="no split"):
        corpus.source("code", split="dev")


def test_arithmetic_is_right_and_repeatable():
    form = re.compile(r"Question: (.+)\nAnswer: (.+)\n#### (-?\d+)\n")
    checked = 0
    for index in range(2000):
        text = problem(3, index)
        assert text == problem(3, index)
        question, steps, result = form.fullmatch(text).groups()
        # Every equation in the steps holds, and the last one gives the result.
        equations = re.findall(r"[\d +*/-]+(?:=[\d +*/-]+)+", steps)
        for equation in equations:
            values = {eval(side) for side in equation.split("=")}
            assert len(values) == 1, text
        assert equations and eval(equations[-1].split("=")[-1]) == int(result)
        asked = re.fullmatch(r"What is (.+)\?", question)
        if asked:
            assert eval(asked[1]) == int(result)
            checked += 1
    assert checked > 500


def test_arithmetic_is_the_same_everywhere():
    assert problem(0, 0) == (
        "Question: Fatou has 5 books. Dina gives Fatou 2 more. "
        "How many books does Fatou have now?\n"
        "Answer: Fatou has 5 + 2 = 7 books.\n#### 7\n"
    )
