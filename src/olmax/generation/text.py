"""Generating text: streaming detokenisation and stop strings."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.generation.decoding import complete
from olmax.models.decoder import Decoder

OnText = Callable[[int, str], None]

_PROMPT_TAIL = 8
"""Prompt tokens that decoding starts from: some decoders treat the first token of a text in a
special way, and a prompt may end inside a character."""

_WINDOW = 64
"""Tokens decoded again for every new one, at most twice as many."""

_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class TextCompletion:
    """What a model made of one prompt."""

    text: str
    """New text, up to the stop string if one came."""
    ids: list[int]
    """All tokens that were generated, those of a stop string among them."""
    finish_reason: Literal["stop", "length"]


class Detokenizer:
    """Text of a growing sequence of tokens, in pieces that never end inside a character."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)[-_PROMPT_TAIL:]
        # Characters of the window that are out already.
        self._emitted = len(_whole(tokenizer.decode(self._ids)))

    def push(self, token: int) -> str:
        """The text that is certain after one more token; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        piece = self._new(_whole(text))
        if len(self._ids) > 2 * _WINDOW:
            self._shorten(text)
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character."""
        return self._new(self._tokenizer.decode(self._ids))

    def _new(self, text: str) -> str:
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return piece

    def _shorten(self, text: str) -> None:
        tail = self._ids[-_WINDOW:]
        tail_text = self._tokenizer.decode(tail)
        # Not where the cut goes through a character.
        if text.endswith(tail_text):
            self._emitted -= len(text) - len(tail_text)
            self._ids = tail


class StopStrings:
    """Lets text through up to the first stop string, wherever pieces are cut."""

    def __init__(self, stops: Sequence[str]):
        if any(not stop for stop in stops):
            raise UserError("a stop string must not be empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that no stop string can begin in any more."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def complete_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: str | Sequence[str] = (),
    stop_token_ids: Sequence[int] | None = None,
    prefix_id: int | None = None,
    on_text: OnText | None = None,
    **kwargs,
) -> list[TextCompletion]:
    """Continues every prompt, results in the order of `prompts`.

    Args:
      model, max_new_tokens: see `decoding.complete`, which takes the other arguments too.
      tokenizer: of the model; nothing is added to what it makes of a prompt.
      stop: string or strings that end a row; they and what follows are cut off.
      stop_token_ids: tokens that end a row; None: the tokenizer's end of text.
      prefix_id: the token that an empty prompt stands for; None: end of text, which precedes every
        document in training.
      on_text: called as `on_text(row, text)` with every piece of new text as soon as it is certain.

    Raises:
      UserError: an empty stop string, or what `decoding.complete` refuses.
    """
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    prefix = [tokenizer.eos_id if prefix_id is None else prefix_id]
    ids = [tokenizer.encode(prompt) or prefix for prompt in prompts]
    rows = [_Row(Detokenizer(tokenizer, prompt), StopStrings(stop)) for prompt in ids]

    def on_token(number: int, token: int) -> bool:
        row = rows[number]
        row.take(row.stops.push(row.detokenizer.push(token)), number, on_text)
        return row.stops.stopped

    completions = complete(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        stop_token_ids=[tokenizer.eos_id] if stop_token_ids is None else stop_token_ids,
        on_token=on_token if stop or on_text is not None else None,
        **kwargs,
    )
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        if not stop and on_text is None:
            for token in completion.ids:
                on_token(number, token)
        if not row.stops.stopped:
            row.take(row.stops.push(row.detokenizer.flush()), number, on_text)
            row.take(row.stops.flush(), number, on_text)
    return [
        TextCompletion("".join(row.pieces), completion.ids, completion.finish_reason)
        for row, completion in zip(rows, completions, strict=True)
    ]


@dataclasses.dataclass
class _Row:
    detokenizer: Detokenizer
    stops: StopStrings
    pieces: list[str] = dataclasses.field(default_factory=list)

    def take(self, piece: str, number: int, on_text: OnText | None) -> None:
        if piece:
            self.pieces.append(piece)
            if on_text is not None:
                on_text(number, piece)


def _whole(text: str) -> str:
    """`text` without the replacement characters that an incomplete character at its end gives: at
    most three bytes of it are there, and a decoder may write one for each.
    """
    for _ in range(3):
        text = text.removesuffix(_REPLACEMENT)
    return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
