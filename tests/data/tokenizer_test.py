import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from olmax.data.tokenizer import Tokenizer, train_bpe
from olmax.errors import UserError

# Encodings made with the released file.
GOLDEN = {
    "Hello world": [9906, 1917],
    "Language modeling is ": [14126, 34579, 374, 220],
    "1234567 tokens": [4513, 10961, 22, 11460],
    "def f(x):\n    return x+1\n": [755, 282, 2120, 997, 262, 471, 865, 10, 16, 198],
    " A": [362],
    " B": [426],
    " the\n\n  café naïve 日本語": [279, 271, 220, 53050, 95980, 588, 76502, 22656, 45918, 252],
    "The capital of France is Paris.<|endoftext|>": [791, 6864, 315, 9822, 374, 12366, 13, 100257],
    "|||EMAIL_ADDRESS|||": [100262],
    "  ": [256],
}
TEXTS = [
    "the cat sat on the mat, 12345 times\n",
    "def f(x):\n    return x + 1\n",
    "Größe 日本語",
] * 20


@pytest.fixture(scope="module")
def dolma2(data_dir):
    path = data_dir / "dolma2_tokenizer" / "allenai_dolma2.json"
    if not path.exists():
        pytest.skip(f"no dolma2 tokenizer at {path}")
    return Tokenizer.from_file(path)


@pytest.fixture(scope="module")
def small():
    return train_bpe(TEXTS, vocab_size=400)


def test_dolma2_golden_encodings(dolma2):
    assert dolma2.encode_batch(list(GOLDEN)) == list(GOLDEN.values())
    for text, ids in GOLDEN.items():
        assert dolma2.encode(text) == ids
        assert dolma2.decode(ids) == text


def test_dolma2_special_ids(dolma2):
    assert (dolma2.vocab_size, dolma2.eos_id, dolma2.pad_id) == (100278, 100257, 100277)


def test_dolma2_splits_numbers_in_threes(dolma2):
    pieces = [dolma2.decode([i]) for i in dolma2.encode("1234567")]
    assert pieces == ["123", "456", "7"]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives(text):
    tokenizer = _SMALL
    assert tokenizer.decode(tokenizer.encode(text)) == text


_SMALL = train_bpe(TEXTS, vocab_size=400)


def test_dolma2_keeps_any_text(dolma2):
    text = "".join(map(chr, [*range(0x3000), *range(0x1F300, 0x1F700)]))
    assert dolma2.decode(dolma2.encode(text)) == text


def test_trained_tokenizer_has_its_special_tokens(small):
    assert small.token_to_id("<|endoftext|>") == small.eos_id
    assert small.token_to_id("<|pad|>") == small.pad_id != small.eos_id
    assert small.encode("a<|endoftext|>")[-1] == small.eos_id
    assert 258 <= small.vocab_size <= 400
    # Merges were learnt: fewer tokens than bytes.
    assert len(small.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_training_gives_the_same_ids_in_another_process(small):
    script = (
        "import sys, json; from olmax.data.tokenizer import train_bpe\n"
        "print(train_bpe(json.load(sys.stdin), vocab_size=400).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == small.fingerprint


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"257 is too small.*258"):
        train_bpe(TEXTS, vocab_size=257)


def test_save_and_read_again(small, tmp_path):
    small.save(tmp_path)
    again = Tokenizer.from_file(tmp_path)
    assert again.fingerprint == small.fingerprint
    assert (again.eos_id, again.pad_id) == (small.eos_id, small.pad_id)
    assert not list(tmp_path.glob("*.partial"))


def test_nothing_is_added_cut_or_padded(small):
    backend = tokenizers.Tokenizer.from_str(small._content)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|pad|> $A <|endoftext|>",
        special_tokens=[("<|pad|>", small.pad_id), ("<|endoftext|>", small.eos_id)],
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    changed = Tokenizer(backend.to_str())
    text = "def f(x): return the cat"
    assert changed.encode(text) == small.encode(text)
    assert changed.encode_batch(["a", text]) == [small.encode("a"), small.encode(text)]


def test_ids_come_from_the_files_beside_it(small, tmp_path):
    (tmp_path / "tokenizer.json").write_text(small._content)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 9], "pad_token_id": 8}))
    read = Tokenizer.from_file(tmp_path)
    assert (read.eos_id, read.pad_id) == (7, 8)
    config = {"eos_token": {"content": "<|pad|>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    read = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (read.eos_id, read.pad_id) == (small.pad_id, 8)
    assert Tokenizer.from_file(tmp_path, eos_id=5).eos_id == 5


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer there"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.from_file(tmp_path)


def test_no_end_of_text_token(tmp_path):
    content = train_bpe(TEXTS, vocab_size=300, special_tokens=["<stop>"])._content
    with pytest.raises(UserError, match="names no end-of-text token"):
        Tokenizer(content)
    tokenizer = Tokenizer(content, eos=["<stop>"])
    assert tokenizer.eos_id == tokenizer.pad_id == 0


def test_half_a_surrogate_pair_is_an_error(small):
    with pytest.raises(UserError, match="surrogate"):
        small.encode("a\ud800b")
