"""Evaluation requests: OLMES request files, and plain (context, continuation) lines.

An OLMES file holds one rendered prompt a line (specs/olmo2.md section 9.4): `request_type`,
`request.context`, `request.continuation`, `doc_id`, `idx` (which choice) and `label` (index of the
right choice, or for a file that scores reference answers the answer itself or null). Rows with
`doc_id` >= 1,000,000 repeat a choice under the context "Answer:"; they serve the pmi normalisation.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from olmax.data.sources import read_records, text_of
from olmax.errors import UserError

UNCONDITIONAL_OFFSET = 1_000_000

REQUEST_TYPES = ("loglikelihood", "generate_until_and_loglikelihood")

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One continuation to score."""

    id: Any
    """Whatever the file calls it."""
    context: str
    continuation: str
    where: str
    """`file:line`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a question."""

    context: str
    continuation: str
    unconditional_context: str | None
    """Context of the unconditional request for the same continuation, where the file has one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """All answers of one document."""

    doc_id: int
    native_id: Any
    choices: tuple[Choice, ...]
    gold: int
    """Index of the right choice; 0 where there is one reference answer only."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The questions of one request file."""

    name: str
    """`<task>_<variant>`, from the two directories the file is in, or the file's own name."""
    path: str
    questions: tuple[Question, ...]
    has_choices: bool
    """False: every question has one reference answer, so only its bits per byte mean anything."""
    settings: Mapping[str, Any]
    """`task_config` of the config.json beside the file; empty without one."""


def read_requests(path: epath.PathLike) -> list[Request]:
    """Lines `{id, context, continuation}` of a json lines file (plain, .gz or .zst).

    Raises:
      UserError: with file and line: no JSON object, a field missing or no string, an empty
        continuation, a surrogate that no encoding has; or no requests at all.
    """
    found = []
    for where, record in _records(path):
        continuation = _continuation(record, where)
        context = text_of(record, "context", where)
        found.append(Request(record.get("id"), context, continuation, where))
    return found


def read_task(path: epath.PathLike) -> Task:
    """One OLMES request file.

    Raises:
      UserError: with file and line: not the format described above, a choice given twice or left
        out, a label that no choice has.
    """
    path = epath.Path(path)
    rows: dict[int, dict[int, _Row]] = {}
    unconditional: dict[int, dict[int, _Row]] = {}
    for where, record in _records(path):
        row = _row(record, where)
        offset = row.doc_id >= UNCONDITIONAL_OFFSET
        doc_id = row.doc_id - UNCONDITIONAL_OFFSET if offset else row.doc_id
        choices = (unconditional if offset else rows).setdefault(doc_id, {})
        if row.idx in choices:
            raise UserError(
                f"{where}: document {row.doc_id} has choice {row.idx} already "
                f"({choices[row.idx].where}); remove one of the two"
            )
        choices[row.idx] = row
    if not rows:
        raise UserError(f"{path}: holds unconditional requests only; nothing to evaluate")
    has_choices = any(len(choices) > 1 for choices in rows.values())
    questions = tuple(
        _question(doc_id, choices, unconditional.get(doc_id, {}), has_choices)
        for doc_id, choices in rows.items()
    )
    return Task(_task_name(path), str(path), questions, has_choices, _settings(path))


def find_request_files(paths: Iterable[str | os.PathLike]) -> list[epath.Path]:
    """Request files that `paths` name: files, and directories with all json lines files below.

    A relative path that is not there is also looked for in `$OLMAX_DATA_DIR/olmes_requests`, so
    that `arc_easy/val_rc_5shot` names a task.

    Raises:
      UserError: a path names nothing.
    """
    found: list[epath.Path] = []
    for given in paths:
        path = epath.Path(given)
        data = os.environ.get("OLMAX_DATA_DIR")
        if not path.exists() and data:
            path = epath.Path(data) / "olmes_requests" / given
        if path.is_dir():
            files = sorted(p for p in _files_below(path) if p.name.endswith(_ENDINGS))
        else:
            files = [path] if path.exists() else []
        if not files:
            raise UserError(
                f"{given}: no request file there; give json lines files ({' '.join(_ENDINGS)}), "
                "directories with such files, or a task below $OLMAX_DATA_DIR/olmes_requests"
            )
        found += [file for file in files if file not in found]
    if not found:
        raise UserError("no request files given")
    return found


def read_tasks(paths: Iterable[str | os.PathLike]) -> list[Task]:
    """The tasks of all request files that `paths` name (see `find_request_files`).

    Raises:
      UserError: a path names nothing, a file is not readable, or two tasks have one name.
    """
    tasks: dict[str, Task] = {}
    for path in find_request_files(paths):
        task = read_task(path)
        if task.name in tasks:
            raise UserError(
                f"{path}: task {task.name} is given by {tasks[task.name].path} too; rename one"
            )
        tasks[task.name] = task
    return list(tasks.values())


@dataclasses.dataclass(frozen=True, slots=True)
class _Row:
    where: str
    doc_id: int
    idx: int
    native_id: Any
    context: str
    continuation: str
    label: Any


def _files_below(directory: epath.Path) -> Iterator[epath.Path]:
    # Not rglob, which paths of remote stores do not have.
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files_below(path)
        else:
            yield path


def _records(path: epath.PathLike) -> Iterable[tuple[str, dict[str, Any]]]:
    path = epath.Path(path)
    if not path.exists() or path.is_dir():
        raise UserError(f"{path}: no such file; give a json lines file of requests")
    empty = True
    for where, record in read_records(path):
        empty = False
        yield where, record
    if empty:
        raise UserError(f"{path}: holds no requests")


def _continuation(record: dict[str, Any], where: str) -> str:
    if "continuation" not in record:
        raise UserError(
            f"{where}: the request has no continuation; every line needs context and continuation"
        )
    continuation = text_of(record, "continuation", where)
    if not continuation:
        raise UserError(f"{where}: the continuation is empty; there is nothing to score")
    return continuation


def _row(record: dict[str, Any], where: str) -> _Row:
    kind, request = record.get("request_type"), record.get("request")
    if kind not in REQUEST_TYPES or not isinstance(request, dict):
        raise UserError(
            f"{where}: not an OLMES request: request_type must be one of "
            f"{', '.join(REQUEST_TYPES)} (is {kind!r}) and request an object with context and "
            "continuation"
        )
    numbers = []
    for field in ("doc_id", "idx"):
        value = record.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{where}: {field} must be a number from 0, is {value!r}")
        numbers.append(value)
    label = record.get("label")
    if not isinstance(label, int | str | None):
        raise UserError(f"{where}: label must be a number, a string or null, is {label!r}")
    return _Row(
        where,
        *numbers,
        native_id=record.get("native_id"),
        context=text_of(request, "context", where),
        continuation=_continuation(request, where),
        label=label,
    )


def _question(
    doc_id: int, rows: dict[int, _Row], unconditional: dict[int, _Row], has_choices: bool
) -> Question:
    ordered = [rows[i] for i in sorted(rows)]
    first = ordered[0]
    if sorted(rows) != list(range(len(rows))):
        raise UserError(
            f"{first.where}: document {doc_id} has the choices {sorted(rows)}, expected "
            f"0 to {len(rows) - 1}; the file is incomplete"
        )
    gold = 0
    if has_choices:
        gold = first.label
        if not isinstance(gold, int) or not 0 <= gold < len(rows):
            raise UserError(
                f"{first.where}: label {gold!r} of document {doc_id} is none of its "
                f"{len(rows)} choices"
            )
    for other in ordered[1:]:
        if other.label != first.label:
            raise UserError(
                f"{other.where}: label {other.label!r}, but {first.label!r} in {first.where}, the "
                "same document"
            )
    choices = []
    for row in ordered:
        plain = unconditional.get(row.idx)
        choices.append(
            Choice(row.context, row.continuation, None if plain is None else plain.context)
        )
    return Question(doc_id, first.native_id, tuple(choices), gold)


def _task_name(path: epath.Path) -> str:
    if path.name.split(".")[0] == "requests":
        return f"{path.parent.parent.name}_{path.parent.name}"
    return path.name.split(".")[0]


def _settings(path: epath.Path) -> Mapping[str, Any]:
    config = path.parent / "config.json"
    if not config.exists():
        return {}
    try:
        settings = json.loads(config.read_text()).get("task_config", {})
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config}: not the configuration of a task ({error})") from None
    return settings if isinstance(settings, dict) else {}


def sample_questions(task: Task, limit: int | None) -> Sequence[Question]:
    """All questions, or `limit` of them spread evenly over the file (request files are ordered by
    subject, so the first ones would not stand for the rest).
    """
    total = len(task.questions)
    if limit is None or limit >= total:
        return task.questions
    return [task.questions[i * total // limit] for i in range(limit)]
