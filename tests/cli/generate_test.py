"""`olmax generate`."""

import json

import pytest

import olmax
from olmax.cli import main as cli
from olmax.cli.generate import Generate


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_prompt_is_continued_on_the_terminal(model_directory, capsys):
    assert cli.run(Generate(str(model_directory), prompt="the cat", max_new_tokens=5)) == 0
    (expected,) = olmax.load(model_directory).generate("the cat", max_new_tokens=5)
    assert capsys.readouterr().out == expected + "\n"


def test_a_file_of_prompts(model_directory, tmp_path):
    rows = [{"id": "x", "prompt": "the cat sat"}, {"prompt": ""}, {"prompt": "mat"}]
    output = tmp_path / "out.jsonl"
    settings = dict(max_new_tokens=6, temperature=0.7, seed=5, top_p=0.9, stop=("t",))
    verb = Generate(
        str(model_directory),
        prompts=written(tmp_path / "in.jsonl", rows),
        output=str(output),
        **settings,
    )
    assert cli.run(verb) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    expected = olmax.load(model_directory).complete([row["prompt"] for row in rows], **settings)
    assert [row["id"] for row in found] == ["x", 1, 2]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    for row, completion in zip(found, expected, strict=True):
        assert row["completion"] == completion.text and "t" not in row["completion"]
        assert row["tokens"] == len(completion.ids)
        assert row["finish_reason"] == completion.finish_reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "give either --prompt TEXT or --prompts FILE"),
        (dict(prompt="a", prompts="b"), "give either"),
        (dict(prompts="in.jsonl"), "--prompts needs --output"),
        (dict(prompts="none.jsonl", output="out"), "none.jsonl: no such file"),
    ],
)
def test_wrong_options(settings, message, capsys):
    assert cli.run(Generate("none", **settings)) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_named(model_directory, tmp_path, capsys):
    rows = [{"prompt": "fine"}, {"prompt": "the cat sat on the mat. " * 200}]
    output = tmp_path / "out.jsonl"
    requests = written(tmp_path / "in.jsonl", rows)
    verb = Generate(str(model_directory), prompts=requests, output=str(output))
    assert cli.run(verb) == 2
    error = capsys.readouterr().err
    assert "in.jsonl:2: the prompt has" in error and "context of 128" in error
    assert not output.exists()


def test_a_row_without_a_prompt_is_named(tmp_path, capsys):
    requests = written(tmp_path / "in.jsonl", [{"prompt": "a"}, {"text": "b"}])
    assert cli.run(Generate("none", prompts=requests, output=str(tmp_path / "out.jsonl"))) == 2
    assert "in.jsonl:2: has no text field 'prompt'" in capsys.readouterr().err
