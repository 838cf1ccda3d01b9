import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from olmax.data import sources
from olmax.errors import UserError

RECORDS = [{"text": f"document {i} ü", "id": f"d{i}"} for i in range(300)]
LINES = b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in RECORDS)


def _read(path, **options):
    return list(sources.files([path], name="web", **options).read())


def _fails(path, content, message, **options):
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        _read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.json.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        # Two frames, as parallel compressors write them.
        ("a.jsonl.zst", lambda b: zstandard.compress(b[:50]) + zstandard.compress(b[50:])),
    ],
)  # fmt: skip
def test_json_lines(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(LINES))
    documents = _read(tmp_path / name)
    assert [(d.text, d.id, d.source) for d in documents] == [
        (r["text"], r["id"], "web") for r in RECORDS
    ]


def test_real_questions(data_dir):
    folder = data_dir / "gsm8k"
    if not folder.is_dir():
        pytest.skip(f"no gsm8k at {folder}")
    files = sorted(folder.rglob("*test*.jsonl"))
    documents = _read(files[0], text_field="question")
    assert len(documents) == 1319
    assert documents[0].id.endswith(":1")


def test_text_files_are_one_document_each(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    (tmp_path / "a.md").write_text("# title")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert [d.text for d in _read(tmp_path)] == ["# title", "one\n\ntwo\n", "three"]


def test_parquet(tmp_path):
    table = pa.table({"text": [r["text"] for r in RECORDS], "id": [r["id"] for r in RECORDS]})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert [(d.text, d.id) for d in _read(tmp_path / "a.parquet")] == [
        (r["text"], r["id"]) for r in RECORDS
    ]


def test_globs_directories_and_duplicates(tmp_path):
    for name in ("x1.jsonl", "x2.jsonl", "sub/x3.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    assert [p.name for p in sources.expand([tmp_path / "x*.jsonl"])] == ["x1.jsonl", "x2.jsonl"]
    assert [p.name for p in sources.expand([tmp_path / "**/x*.jsonl"])] == [
        "x3.jsonl", "x1.jsonl", "x2.jsonl",
    ]  # fmt: skip
    assert len(sources.expand([tmp_path, tmp_path / "x1.jsonl"])) == 3
    with pytest.raises(UserError, match=r"none\*\.jsonl: no such file"):
        sources.expand([tmp_path / "none*.jsonl"])
    with pytest.raises(UserError, match="no such file"):
        sources.files([tmp_path / "missing.jsonl"], name="web")


def test_fingerprint_follows_the_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    first = sources.files([path], name="web").fingerprint
    assert sources.files([path], name="web").fingerprint == first
    assert sources.files([path], name="web", text_field="id").fingerprint != first
    path.write_bytes(LINES[:-1] + b" ")
    assert sources.files([path], name="web").fingerprint != first


def test_truncated_json_lines(tmp_path):
    message = _fails(tmp_path / "a.jsonl", LINES[:-12], r"a\.jsonl:300: not a JSON object")
    assert "cut short" in message


def test_mixed_encodings(tmp_path):
    lines = LINES.splitlines(keepends=True)
    lines[6] = lines[6].decode().encode("latin-1")
    _fails(tmp_path / "a.jsonl", b"".join(lines), r"a\.jsonl:7: not UTF-8 \(byte 0xfc at column")
    _fails(tmp_path / "a.jsonl", LINES.decode().encode("utf-16"), r"a\.jsonl:1: not UTF-8")
    _fails(tmp_path / "a.txt", b"fine\nGr\xfc\xdfe\n", r"a\.txt:2: not UTF-8")


def test_a_byte_order_mark_is_no_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES)
    assert len(_read(tmp_path / "a.jsonl")) == 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n["b"]\n', r":2: a JSON object a line is expected, this is an array"),
        (b'{"content": "a"}\n', r":1: has no text field 'text'; fields are content"),
        (b'{"text": 5}\n', r":1: has a number as text field"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r":2: text holds half of a surrogate pair"),
        (b"", "holds no documents"),
        (b"\n \n", "holds no documents"),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    _fails(tmp_path / "a.jsonl", content, message)


def test_compressed_files_cut_short(tmp_path):
    packed = gzip.compress(LINES)
    _fails(tmp_path / "a.jsonl.gz", packed[:-15], r"a\.jsonl\.gz:\d+: compressed data ends early")
    _fails(tmp_path / "a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz:1: compressed data")
    packed = zstandard.compress(LINES)
    # Cut between two whole frames nothing is missing; cut inside one it is said.
    _fails(tmp_path / "a.jsonl.zst", packed[:-3], r"a\.jsonl\.zst:\d+: compressed data ends early")
    _fails(tmp_path / "a.jsonl.zst", packed + packed[:9], r"a\.jsonl\.zst:301: compressed data")


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    content = path.read_bytes()
    _fails(path, content, r"has no column 'text'; columns are body, n")
    _fails(path, content, r"row 0: column 'n' holds no text", text_field="n")
    _fails(path, content[: len(content) // 2], "not a whole parquet file", text_field="body")


def test_unknown_format(tmp_path):
    _fails(tmp_path / "a.csv", b"text\nx\n", "unknown format")
    (tmp_path / "a.csv").write_bytes(LINES)
    assert len(_read(tmp_path / "a.csv", format="jsonl")) == 300
