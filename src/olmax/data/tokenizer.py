"""Tokenizers as `tokenizer.json` files, without tensorflow; a BPE trained on the spot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from etils import epath

from olmax.errors import UserError

# Pre-tokenizer of cl100k_base, which dolma2 shares: contractions, words with one leading
# non-letter, digits in threes, punctuation with its line ends, line ends, spaces.
DOLMA2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"

# Names under which released tokenizers carry these tokens, tried where no side file names them.
_EOS_NAMES = (EOS_TOKEN, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_PAD_NAMES = (PAD_TOKEN, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")


class Tokenizer:
    """A `tokenizer.json` with its end-of-text and padding ids.

    Nothing is ever added to what is encoded: no beginning or end token, no padding, no truncation.
    Special tokens that occur literally in the text become their single ids, as in the reference
    tokenizer.

    Attributes:
        eos_id: id of the token put after every document.
        pad_id: id of the padding token; equals `eos_id` where the file has none.
        vocab_size: largest id + 1 (100278 for dolma2; models may pad their embedding beyond it).
        fingerprint: hash of the file's content, 16 hexadecimal digits.
    """

    def __init__(
        self,
        content: str,
        *,
        eos: Sequence[int | str | None] = (),
        pad: Sequence[int | str | None] = (),
    ):
        """Builds from the text of a `tokenizer.json`; see `from_file` for the usual way in.

        Args:
            content: the file's text.
            eos: ids or strings of the end-of-text token; the first that the tokenizer knows is it.
                Usual names are tried after them.
            pad: the same for padding.

        Raises:
            UserError: not a tokenizer file, or no end-of-text token can be found and none is given.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(content)
        except Exception as e:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json: {_one_line(e)}") from e
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._content = content
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        eos_id = self._first_known((*eos, *_EOS_NAMES))
        pad_id = self._first_known((*pad, *_PAD_NAMES))
        if eos_id is None:
            raise UserError(
                "the tokenizer names no end-of-text token; give eos_id, or put eos_token into "
                "tokenizer_config.json"
            )
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id

    @classmethod
    def from_file(
        cls, path: epath.PathLike, *, eos_id: int | None = None, pad_id: int | None = None
    ) -> Tokenizer:
        """Reads a `tokenizer.json`, given as the file or as its directory.

        The ids of end-of-text and padding are, in this order: the arguments; `eos_token` and
        `pad_token` of tokenizer_config.json beside the file; `eos_token_id` and `pad_token_id` of
        config.json; a token with one of the usual names.

        Raises:
            UserError: the file is missing or no tokenizer, or there is no end-of-text token.
        """
        path = epath.Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            content = path.read_text()
        except (FileNotFoundError, IsADirectoryError) as e:
            raise UserError(
                f"{path}: no tokenizer there; give a tokenizer.json or its directory"
            ) from e
        except UnicodeDecodeError as e:
            raise UserError(f"{path}: not a tokenizer.json (not UTF-8 text)") from e
        try:
            return cls(
                content,
                eos=(eos_id, *_named_beside(path.parent, "eos")),
                pad=(pad_id, *_named_beside(path.parent, "pad")),
            )
        except UserError as e:
            raise UserError(f"{path}: {e}") from e

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added.

        Raises:
            UserError: the text holds half of a surrogate pair, which no encoding has.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added; runs on all cores. Raises as `encode`."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as e:  # how the library reports a str that UTF-8 cannot hold
            raise UserError(
                "text cannot be tokenised: it holds half of a surrogate pair, which no encoding has"
            ) from e
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens included; ids without a token give nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """Id of a token given by its exact string, or None."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token's own string (in the byte alphabet of byte-level BPE), or None."""
        return self._backend.id_to_token(token_id)

    def save(self, directory: epath.PathLike) -> None:
        """Writes `tokenizer.json`, byte for byte as read, and the names of eos and pad."""
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.id_to_token(self.eos_id),
            "pad_token": self.id_to_token(self.pad_id),
            # Old transformers would otherwise remove spaces before punctuation when decoding.
            "clean_up_tokenization_spaces": False,
        }
        for name, text in (
            ("tokenizer_config.json", json.dumps(config, indent=2) + "\n"),
            ("tokenizer.json", self._content),
        ):
            partial = directory / (name + ".partial")
            partial.write_text(text)
            partial.replace(directory / name)

    def _first_known(self, tokens: Sequence[int | str | None]) -> int | None:
        ids = (self._backend.token_to_id(t) if isinstance(t, str) else t for t in tokens)
        return next((i for i in ids if i is not None), None)


def _named_beside(directory: epath.Path, kind: str) -> list[int | str | None]:
    """What the files beside a tokenizer.json say is the `eos` or `pad` token."""
    token: Any = _read_json(directory / "tokenizer_config.json").get(f"{kind}_token")
    if isinstance(token, dict):  # a serialised AddedToken
        token = token.get("content")
    token_id: Any = _read_json(directory / "config.json").get(f"{kind}_token_id")
    if isinstance(token_id, list):  # several stop ids; the first one ends a document
        token_id = token_id[0] if token_id else None
    return [token, token_id]


def _read_json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path.name} beside it is not JSON: {_one_line(e)}") from e
    return value if isinstance(value, dict) else {}


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    special_tokens: Sequence[str] = (EOS_TOKEN, PAD_TOKEN),
    pattern: str = DOLMA2_PATTERN,
) -> Tokenizer:
    """Trains a byte-level BPE: any text survives encoding and decoding; the same texts give the
    same ids.

    Args:
        texts: training text, read once.
        vocab_size: number of ids, special tokens and the 256 bytes included; fewer come out if the
            text has too few distinct pairs.
        special_tokens: the first is end of text, the second (if any) padding; they get the first
            ids.
        pattern: pre-tokenizer regular expression.

    Raises:
        UserError: `vocab_size` has no room for the bytes and the special tokens.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} is too small: bytes and special tokens take {smallest}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(
        backend.to_str(),
        eos=special_tokens[:1],
        pad=special_tokens[1:2],
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
