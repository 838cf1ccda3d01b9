"""`olmax score`."""

import json

import pytest

import olmax
from olmax.cli import main as cli
from olmax.cli.score import Score


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_scores_in_the_order_of_the_requests(model_directory, tmp_path):
    rows = [
        {"id": "long", "context": "the cat sat on the mat. " * 40, "continuation": " the cat"},
        {"id": 7, "context": "the", "continuation": " mat"},
        {"context": "", "continuation": "日本"},
    ]
    output = tmp_path / "new" / "out.jsonl"
    verb = Score(str(model_directory), written(tmp_path / "in.jsonl", rows), str(output))
    assert cli.run(verb) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    expected = olmax.load(model_directory).score([(r["context"], r["continuation"]) for r in rows])
    assert [row["id"] for row in found] == ["long", 7, None]
    for row, score in zip(found, expected, strict=True):
        assert list(row) == ["id", "logprob", "tokens", "is_greedy"]
        assert row["logprob"] == pytest.approx(score.logprob, abs=1e-5)
        assert (row["tokens"], row["is_greedy"]) == (score.tokens, score.is_greedy)
    assert [p.name for p in output.parent.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "context": "a"}, "in.jsonl:2: the request has no continuation"),
        ({"id": 1, "context": "a", "continuation": ""}, "in.jsonl:2: the continuation is empty"),
        ({"context": 1, "continuation": "b"}, "in.jsonl:2: has a number as text field 'context'"),
        ({"context": "\ud800", "continuation": "b"}, "in.jsonl:2: text holds half of a surrogate"),
    ],
)
def test_bad_requests_stop_everything_before_the_model_is_read(tmp_path, capsys, row, message):
    requests = written(tmp_path / "in.jsonl", [{"context": "a", "continuation": "b"}, row])
    output = tmp_path / "out.jsonl"
    # There is no such model: had it been looked for, the message would be another.
    assert cli.run(Score(str(tmp_path / "none"), requests, str(output))) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not output.exists()


def test_an_output_that_cannot_be_a_file(tmp_path, capsys):
    requests = written(tmp_path / "in.jsonl", [{"context": "a", "continuation": "b"}])
    assert cli.run(Score(str(tmp_path / "none"), requests, str(tmp_path))) == 2
    assert "is a directory" in capsys.readouterr().err
