"""The `olmax` command as a whole: quick to start, and one line for what the user can mend."""

import os
import subprocess
import sys

import pytest

from olmax.cli import main as cli
from olmax.errors import UserError


def run(repository, *arguments, **environ):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=repository,
        env=os.environ | {"PYTHONPATH": "src:."} | environ,
        capture_output=True,
        text=True,
        timeout=300,
    )


def processor_seconds(repository, *arguments) -> float:
    """User and system time: on a busy machine the wall clock says nothing."""
    code = (
        "import os, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True);"
        "t = os.times(); print(t.children_user + t.children_system)"
    )
    return float(run(repository, "-c", code, sys.executable, *arguments).stdout)


@pytest.mark.parametrize(
    "arguments", [("-c", "import olmax"), ("-m", "olmax.cli.main", "--help")], ids=str
)
def test_starts_within_a_second_and_a_half(repository, arguments):
    assert min(processor_seconds(repository, *arguments) for _ in range(3)) < 1.5


HEAVY = ("jax", "flax", "tensorflow", "seqio", "orbax", "matplotlib", "pandas")


@pytest.mark.parametrize("module", ["olmax", "olmax.cli.main"])
def test_import_is_light(repository, module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(repository, "-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "module", ["olmax.pretrained", "olmax.training.trainer", "olmax.data.loader", "olmax.interop"]
)
def test_computing_parts_do_not_import_tensorflow(repository, module):
    code = f"import sys, {module}; print('tensorflow' in sys.modules or 'seqio' in sys.modules)"
    assert run(repository, "-c", code).stdout.strip() == "False"


def test_help_lists_every_verb(repository):
    result = run(repository, "-m", "olmax.cli.main", "--help")
    assert result.returncode == 0
    for verb in cli.VERBS:
        assert verb in result.stdout


SCORE = ("score", "--model", "m", "--requests", "r")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("frobnicate",), "frobnicate"),
        ((), "score"),
        (("score",), "--model, --requests, --output"),
        ((*SCORE, "--output", "o", "--colour", "red"), "--colour"),
        ((*SCORE, "--output", "o", "--dtyp", "float32"), "did you mean --dtype?"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line_and_status_two(arguments, said, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("olmax: ") and error.count("\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_wrong_arguments_read_the_same_in_every_encoding(repository, encoding):
    arguments = ("-m", "olmax.cli.main", *SCORE, "--output", "o", "--dtyp", "float32")
    result = run(repository, *arguments, PYTHONIOENCODING=encoding)
    assert result.returncode == 2
    assert result.stderr == (
        "olmax: Unrecognized options: --dtyp, float32; did you mean --dtype?; "
        "--help lists the options\n"
    )


def test_help_goes_to_standard_output_with_status_zero(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["score", "--help"])
    assert not ended.value.code
    assert "--requests" in capsys.readouterr().out


def test_a_users_error_is_one_line_and_status_two(capsys):
    class Verb:
        def run(self):
            raise UserError("requests.jsonl:3: no continuation; add one")

    assert cli.run(Verb()) == 2
    assert capsys.readouterr().err == "olmax: requests.jsonl:3: no continuation; add one\n"


def test_a_programming_error_keeps_its_traceback():
    class Verb:
        def run(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(Verb())


def test_a_model_path_that_is_not_there_says_what_one_may_be(repository, tmp_path):
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"id": 1, "context": "a", "continuation": "b"}\n')
    result = run(
        repository, "-m", "olmax.cli.main", "score", "--model", str(tmp_path / "none"),
        "--requests", str(requests), "--output", str(tmp_path / "out.jsonl"),
    )  # fmt: skip
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(tmp_path / "none") in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
