"""The tokenizer files of a Hugging Face directory."""

import json
import logging
import os
from typing import Any, Protocol

from etils import epath

from olmax.errors import UserError
from olmax.interop import source
from olmax.interop.source import read_mapping

_logger = logging.getLogger(__name__)

# Copied as they are where the source has them.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")

_ROLES = {
    "bos_token": ("<|begin_of_text|>", "<s>", "<bos>"),
    "eos_token": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"),
    "pad_token": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
}
"""Names that special tokens go by, for a tokenizer.json that comes alone (it does not say which
token ends a text).
"""


class SavedTokenizer(Protocol):
    """What is needed of a tokenizer object, such as `olmax.data.tokenizer.Tokenizer`."""

    eos_id: int
    pad_id: int

    def save(self, directory: epath.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json."""


TokenizerLike = str | os.PathLike | SavedTokenizer


def find_tokenizer(model: str | os.PathLike) -> epath.Path | None:
    """The `tokenizer.json` of a model path: in its directory, or for `run/checkpoints[/step]` in
    the run directory.
    """
    directory = epath.Path(model)
    if not directory.is_dir():
        directory = epath.Path(source.local_directory(model))
    candidates = [directory]
    for inside in (directory, directory.parent):
        if inside.name == "checkpoints":
            candidates.append(inside.parent)
    found = (candidate / "tokenizer.json" for candidate in candidates)
    return next((file for file in found if file.exists()), None)


def stop_token_ids(model: str | os.PathLike) -> list[int]:
    """Tokens at which generation ends according to a Hugging Face directory: `eos_token_id` of its
    generation_config.json, else of its config.json; empty where neither says.
    """
    directory = epath.Path(model)
    if not directory.is_dir():
        directory = epath.Path(source.local_directory(model))
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            told = source.read_mapping(directory / name).get("eos_token_id")
            if told is not None:
                return list(told) if isinstance(told, list) else [told]
    return []


def copy_tokenizer(
    tokenizer: TokenizerLike, directory: epath.Path, *, vocab_size: int
) -> dict[str, Any]:
    """Writes a tokenizer into `directory`, with the files that transformers' AutoTokenizer needs.

    Args:
      tokenizer: a `tokenizer.json`, a directory that holds one, or a tokenizer object.
      directory: where to.
      vocab_size: rows of the model's embedding.

    Returns:
      `bos_token_id`, `eos_token_id` and `pad_token_id`, each an id, a list of ids or None.

    Raises:
      UserError: no tokenizer there, it is not readable, or it has more tokens than the model.
    """
    if isinstance(tokenizer, str | os.PathLike):
        special: dict[str, Any] = _copy_files(epath.Path(tokenizer), directory)
    else:
        tokenizer.save(directory)
        special = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    largest = _largest_id(directory / "tokenizer.json")
    if largest >= vocab_size:
        raise UserError(
            f"{tokenizer}: has token ids up to {largest}, the model only {vocab_size} embedding "
            "rows; give the tokenizer that the model was trained with"
        )
    for key, value in special.items():
        # A token added behind the embedding cannot be fed in; transformers refuses it as padding.
        if isinstance(value, int) and value >= vocab_size:
            _logger.warning(
                "%s %d is beyond the %d embedding rows; left out", key, value, vocab_size
            )
            special[key] = None
    return {"bos_token_id": None, **special}


def _copy_files(file: epath.Path, directory: epath.Path) -> dict[str, Any]:
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{file}: no tokenizer.json; give the file or a directory that holds it")
    ids = _added_tokens(file)
    (directory / "tokenizer.json").write_bytes(file.read_bytes())
    for companion in _COMPANIONS:
        if (file.parent / companion).exists():
            (directory / companion).write_bytes((file.parent / companion).read_bytes())
    names = _special_tokens(file.parent, ids)
    if not (directory / "tokenizer_config.json").exists():
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{role: name for role, name in names.items() if name is not None},
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(values, indent=2) + "\n")
    special = {f"{role}_id": ids.get(name or "") for role, name in names.items()}
    # A model may end on several tokens; only its own configuration knows.
    for companion in ("config.json", "generation_config.json"):
        if (file.parent / companion).exists():
            known = read_mapping(file.parent / companion)
            told = {key: known.get(key) for key in special}
            special |= {key: value for key, value in told.items() if isinstance(value, int | list)}
    return special


def _added_tokens(file: epath.Path) -> dict[str, int]:
    tokens = read_mapping(file).get("added_tokens") or []
    try:
        return {token["content"]: token["id"] for token in tokens}
    except (TypeError, KeyError):
        raise UserError(
            f"{file}: added_tokens must be a list of objects with content and id"
        ) from None


def _largest_id(file: epath.Path) -> int:
    """Largest id of the base vocabulary (added tokens may lie behind a model's embedding)."""
    model = read_mapping(file).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        return max(vocab.values(), default=0)
    return len(vocab or ()) - 1


def _special_tokens(directory: epath.Path, ids: dict[str, int]) -> dict[str, str | None]:
    """Which token has which role: as tokenizer_config.json says, else by its name."""
    config = directory / "tokenizer_config.json"
    told = read_mapping(config) if config.exists() else {}
    names: dict[str, str | None] = {}
    for role, usual in _ROLES.items():
        name = told.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        if name is None and not told:
            name = next((candidate for candidate in usual if candidate in ids), None)
        names[role] = name
    return names
