"""Streaming text: characters stay whole, stop strings are found wherever tokens are cut."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from olmax.data.tokenizer import Tokenizer, train_bpe
from olmax.errors import UserError
from olmax.generation.text import Detokenizer, StopStrings, complete_text
from olmax.models import Decoder, get_preset

TEXT = "naïve café 日本語 😀 def f(x):\n    return x+1\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    # Bytes alone: every character beyond ASCII is several tokens.
    return train_bpe(["x"], vocab_size=258)


def stream(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


def test_pieces_join_to_the_text_and_never_split_a_character(tokenizer):
    ids = tokenizer.encode(TEXT * 5)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT * 5
    assert len(ids) > 256 and all("\ufffd" not in piece for piece in pieces)
    # Streamed, not held back to the end.
    assert sum(bool(piece) for piece in pieces) == len(TEXT * 5)


def test_dolma2_pieces(data_dir):
    tokenizer = Tokenizer.from_file(data_dir / "dolma2_tokenizer" / "allenai_dolma2.json")
    ids = tokenizer.encode(TEXT * 20)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT * 20
    assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_are_no_text_come_out_as_the_whole_would_decode(tokenizer):
    rng = np.random.default_rng(0)
    first = tokenizer.encode("é")[0]
    ids = [*rng.integers(2, 258, 300).tolist(), first]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_prompt_may_end_inside_a_character(tokenizer):
    start, end = tokenizer.encode("é")
    assert "".join(stream(tokenizer, [end], prompt=[*tokenizer.encode("caf"), start])) == "é"


def test_stop_strings_across_pieces():
    for cut in range(1, 11):
        text = "one STOP two"
        stops = StopStrings(["STOP", "STORE"])
        assert stops.push(text[:cut]) + stops.push(text[cut:]) == "one "
        assert stops.stopped
        assert stops.push("more") == ""


def test_text_that_only_begins_like_a_stop_string_comes_out():
    stops = StopStrings(["STOP"])
    assert stops.push("a ST") == "a "
    assert stops.push("AR ST") == "STAR "
    assert stops.flush() == "ST" and not stops.stopped
    with pytest.raises(UserError, match="must not be empty"):
        StopStrings([""])


def test_completions_with_stop_strings_stream_what_they_return(tokenizer):
    config = dataclasses.replace(
        get_preset("olmo2-tiny"), n_layers=1, d_model=32, d_ff=64, n_heads=2, n_kv_heads=2,
        head_dim=16, vocab_size=tokenizer.vocab_size, max_seq_len=64,
    )  # fmt: skip
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(1)))()
    settings = dict(max_new_tokens=24, temperature=1.0, seed=2)
    free = complete_text(model, tokenizer, ["ab", ""], **settings)
    assert free[0].text == tokenizer.decode(free[0].ids)
    characters = [c for c in free[0].text if c != "\ufffd"]
    stop = free[0].text[free[0].text.index(characters[3]) :][:2].rstrip("\ufffd")
    pieces = {0: "", 1: ""}

    def on_text(row, piece):
        pieces[row] += piece

    stopped = complete_text(model, tokenizer, ["ab", ""], stop=stop, on_text=on_text, **settings)
    assert stopped[0].text == free[0].text[: free[0].text.index(stop)]
    assert stopped[0].finish_reason == "stop"
    assert stopped[0].ids == free[0].ids[: len(stopped[0].ids)]
    assert pieces == {0: stopped[0].text, 1: stopped[1].text}
