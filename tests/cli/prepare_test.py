import json

import pytest

from olmax.cli.mixes import Mixes
from olmax.cli.prepare import Prepare
from olmax.data import npy, prepared
from olmax.data.tokenizer import train_bpe
from olmax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    texts = [f"a document about {i}" for i in range(50)]
    train_bpe(texts, vocab_size=300).save(tmp_path / "tokenizer")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "web.jsonl").write_text(lines)
    (tmp_path / "book.txt").write_text("\n".join(texts))
    return tmp_path


def test_prepare_makes_named_sources_and_token_files(folder, capsys):
    Prepare(
        input=(str(folder / "*.jsonl"), f"books={folder / 'book.txt'}"),
        tokenizer=str(folder / "tokenizer"),
        output=str(folder / "out"),
        sequence_length=32,
        export_npy=True,
    ).run()
    manifest = prepared.Manifest.read(folder / "out")
    assert [(s.name, s.documents) for s in manifest.sources] == [("text", 50), ("books", 1)]
    assert "books" in capsys.readouterr().out
    tokens = npy.open_tokens(folder / "out" / "books.npy")
    assert len(tokens) == 32 * manifest.sources[1].instances


def test_prepare_with_bad_input_leaves_nothing(folder):
    (folder / "web.jsonl").write_text('{"text": "fine"}\n{"text": "cut sho')
    with pytest.raises(UserError, match=r"web\.jsonl:2"):
        Prepare(
            input=(str(folder / "web.jsonl"),),
            tokenizer=str(folder / "tokenizer"),
            output=str(folder / "out"),
            sequence_length=8,
        ).run()
    assert sorted(p.name for p in folder.iterdir()) == ["book.txt", "tokenizer", "web.jsonl"]


def test_mixes_prints_all_or_one(capsys):
    Mixes().run()
    text = capsys.readouterr().out
    assert "olmo_mix_1124" in text and "dolmino_mix_1124_300b" in text
    Mixes(name="dolmino_mix_1124_50b").run()
    text = capsys.readouterr().out
    assert "47.2" in text and "olmo_mix_1124" not in text
    with pytest.raises(UserError, match="no mix"):
        Mixes(name="dolma").run()
