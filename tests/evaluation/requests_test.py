"""Reading OLMES request files: the published counts, and what damaged files say."""

import gzip
import json

import pytest

from olmax.errors import UserError
from olmax.evaluation.requests import (
    find_request_files,
    read_requests,
    read_task,
    read_tasks,
    sample_questions,
)

# Documents and scored rows of each file (specs/olmo2.md section 9.4).
COUNTS = {
    "arc_challenge/test_mc_5shot": (1172, 4687),
    "arc_challenge/test_rc_5shot": (1172, 4687),
    "arc_challenge/val_rc_5shot": (299, 1194),
    "arc_easy/val_mc_5shot": (570, 2281),
    "basic_skills_coding/rc_5shot": (1012, 5059),
    "basic_skills_pattern/rc_5shot": (534, 2142),
    "boolq/val_rc_5shot": (3270, 6540),
    "codex_humaneval/gold_bpb_3shot": (164, 164),
    "codex_mbpp/gold_bpb_3shot": (500, 500),
    "copycolors/10way": (100, 1000),
    "csqa/val_rc_5shot": (1221, 6105),
    "gsm8k/gold_bpb_5shot": (1319, 1319),
    "hellaswag/rc_5shot": (1000, 4000),
    "minerva_math_500/gold_bpb_0shot": (500, 500),
    "openbookqa/val_rc_5shot": (500, 2000),
    "piqa/val_rc_5shot": (1838, 3676),
    "socialiqa/val_mc_5shot": (1954, 5862),
    "winogrande/val_rc_5shot": (1267, 2534),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(data_dir, name):
    task = read_task(data_dir / "olmes_requests" / name / "requests.jsonl.gz")
    assert task.name == name.replace("/", "_")
    documents, rows = COUNTS[name]
    assert len(task.questions) == documents
    assert sum(len(q.choices) for q in task.questions) == rows
    assert task.has_choices == (rows > documents)


def test_all_files_are_found_and_all_unconditional_rows_find_their_choice(data_dir):
    files = find_request_files([data_dir / "olmes_requests"])
    assert len(files) == 36
    task = read_task(data_dir / "olmes_requests/arc_challenge/val_rc_5shot/requests.jsonl.gz")
    for question in task.questions:
        assert {c.unconditional_context for c in question.choices} == {"Answer:"}
        # The unconditional rows have become part of the choices, not questions of their own.
        assert question.doc_id < 1_000_000
    boolq = read_task(data_dir / "olmes_requests/boolq/val_rc_5shot/requests.jsonl.gz")
    assert boolq.questions[0].choices[0].unconditional_context is None


def test_a_task_is_found_below_the_data_directory(data_dir, monkeypatch):
    monkeypatch.setenv("OLMAX_DATA_DIR", str(data_dir))
    (task,) = read_tasks(["copycolors/10way"])
    assert task.name == "copycolors_10way"
    assert task.settings["primary_metric"] == "acc_raw"


def row(doc_id=0, idx=0, label=0, **changes):
    value = {
        "request_type": "loglikelihood",
        "request": {"context": "Q:", "continuation": f" answer {idx}"},
        "doc_id": doc_id,
        "idx": idx,
        "label": label,
    }
    return value | changes


def written(tmp_path, rows, name="task.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_a_sample_is_spread_over_the_file(tmp_path):
    rows = [row(doc, idx) for doc in range(10) for idx in range(2)]
    task = read_task(written(tmp_path, rows))
    assert [q.doc_id for q in sample_questions(task, 4)] == [0, 2, 5, 7]
    assert len(sample_questions(task, 99)) == len(sample_questions(task, None)) == 10


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(), row(idx=1, request={"context": "Q"})], r"task.jsonl:2: the request has no cont"),
        ([row(request={"context": "Q", "continuation": ""})], ":1: the continuation is empty"),
        ([row(request={"context": "Q", "continuation": 3})], ":1: has a number as text field"),
        ([row(request={"continuation": " a"})], "has no text field 'context'"),
        ([row(request_type="generate")], ":1: not an OLMES request"),
        ([row(doc_id="x")], ":1: doc_id must be a number"),
        ([row(), row()], ":2: document 0 has choice 0 already"),
        ([row(), row(idx=2)], "has the choices .0, 2., expected 0 to 1"),
        ([row(label=2), row(idx=1, label=2)], "label 2 of document 0 is none of its 2 choices"),
        ([row(), row(idx=1, label=1)], ":2: label 1, but 0 in .*:1"),
        ([row(doc_id=1_000_000)], "unconditional requests only"),
        ([], "holds no requests"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_task(written(tmp_path, rows))


def test_plain_requests(tmp_path):
    rows = [
        {"id": "a", "context": "", "continuation": "x"},
        {"context": "c", "continuation": " y", "more": 1},
    ]
    first, second = read_requests(written(tmp_path, rows))
    assert (first.id, first.context, first.continuation) == ("a", "", "x")
    assert second.id is None and second.where.endswith("task.jsonl:2")
    with pytest.raises(UserError, match=r"task.jsonl:1: the request has no continuation"):
        read_requests(written(tmp_path, [{"id": 1, "context": "x"}]))


def test_damaged_files_say_where(tmp_path):
    content = gzip.compress(b"".join(json.dumps(row(d)).encode() + b"\n" for d in range(5000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut.jsonl.gz:\d+: compressed data ends early"):
        read_task(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(
        json.dumps(row()).encode() + b"\n" + '{"context": "é"}'.encode("latin-1")
    )
    with pytest.raises(UserError, match=r"latin.jsonl:2: not UTF-8"):
        read_task(tmp_path / "latin.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"context": "x", "conti')
    with pytest.raises(UserError, match=r"bad.jsonl:1: not a JSON object"):
        read_requests(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_requests(tmp_path / "absent.jsonl")


def test_two_tasks_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, [row()])
    with pytest.raises(UserError, match="task task is given by"):
        read_tasks([tmp_path])
