"""`olmax.load`: a model from any model path, as a handle to score, generate and get logits with."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from olmax import interop, sharding
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.evaluation import scoring
from olmax.evaluation.scoring import Score
from olmax.generation import decoding, text
from olmax.generation.batching import as_ids, length_bucket, place, row_bucket
from olmax.generation.text import TextCompletion
from olmax.models.config import DecoderConfig, Execution
from olmax.models.decoder import Decoder
from olmax.training import checkpoint_files, checkpoints

DTYPES = ("float32", "bfloat16", "float16")

MODEL_PATHS = (
    "a model path is a Hugging Face directory, a hub id (owner/name), a run directory or "
    "checkpoint of olmax, or a checkpoint directory of OLMo or OLMo-core"
)


def load_model(
    path: str | os.PathLike,
    *,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
    execution: Execution = Execution(),
) -> Decoder:
    """The model that `path` names, whichever code base wrote it.

    Args:
      path: a Hugging Face directory, a hub id, a run directory or checkpoint of ours, or a
        checkpoint directory of OLMo or OLMo-core; local or remote.
      param_dtype: dtype of the parameters: float32, bfloat16 or float16.
      compute_dtype: dtype of matrix products.
      mesh: where the parameters go; None: the default device.
      execution: how to run the model; its dtypes are replaced by the two above.

    Raises:
      UserError: no model there, or one that cannot be read.
    """
    for dtype in (param_dtype, compute_dtype):
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    try:
        kind = interop.detect(path)
    except UserError as error:
        raise UserError(f"{error}; {MODEL_PATHS}") from error
    if kind is not None:
        return interop.load_model(
            path,
            param_dtype=param_dtype,
            compute_dtype=compute_dtype,
            mesh=mesh,
            execution=execution,
        )
    if not _is_ours(epath.Path(path)):
        raise UserError(f"{path}: no model there; {MODEL_PATHS}")
    execution = dataclasses.replace(execution, param_dtype=param_dtype, compute_dtype=compute_dtype)
    return checkpoints.restore_model(os.fspath(path), execution=execution, mesh=mesh)


def load(path: str | os.PathLike, dtype: str = "float32", mesh: Mesh | None = None) -> "Pretrained":
    """A handle on the model that `path` names.

    Args:
      path: see `load_model`.
      dtype: of parameters and matrix products: float32, bfloat16 or float16.
      mesh: where the model goes; None: the default device.

    Raises:
      UserError: no model there, or one that cannot be read.
    """
    model = load_model(path, param_dtype=dtype, compute_dtype=dtype, mesh=mesh)
    return Pretrained(model, path=path, mesh=mesh)


class Pretrained:
    """A model with the tokenizer found beside it.

    Without a tokenizer everything that takes token ids works, and what takes text raises
    `UserError`.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        path: str | os.PathLike | None = None,
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ):
        """From a model, and its tokenizer or the model path where one may lie."""
        self.model = model
        self._path = path
        self._mesh = mesh
        self._given_tokenizer = tokenizer

    @property
    def config(self) -> DecoderConfig:
        """The architecture."""
        return self.model.config

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer in the model's directory, or in the run directory of a checkpoint; None
        without one.

        Raises:
          UserError: there is one that cannot be used.
        """
        if self._given_tokenizer is not None or self._path is None:
            return self._given_tokenizer
        file = interop.find_tokenizer(self._path)
        return None if file is None else Tokenizer.from_file(file)

    @functools.cached_property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end a text: what a Hugging Face directory says, as transformers reads it
        (`interop.stop_token_ids`), else the tokenizer's end of text.
        """
        found = [] if self._path is None else interop.stop_token_ids(self._path)
        if not found and self.tokenizer is not None:
            found = [self.tokenizer.eos_id]
        return found

    def logits(self, ids_BL: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """float32 logits [B, L, V] of token ids [B, L].

        Rows and lengths are padded to a few sizes, so that calls of different shapes share
        compilations; the result has the shape that was asked for.

        Raises:
          UserError: not a matrix of integers, an id outside the vocabulary, or rows longer than
            the model's context.
        """
        try:
            array = np.asarray(ids_BL)
        except ValueError:
            raise UserError("logits: the rows of ids_BL differ in length") from None
        if array.ndim != 2 or not array.size:
            raise UserError(f"logits: ids_BL must be [B, L], is of shape {list(array.shape)}")
        rows, length = array.shape
        if length > self.config.max_seq_len:
            raise UserError(
                f"logits: rows of {length} tokens are longer than the model's context of "
                f"{self.config.max_seq_len}; shorten them"
            )
        flat = as_ids(array.reshape(-1), self.config, "logits")
        padded_BL = np.zeros(
            (row_bucket(rows, self._mesh), length_bucket(length, self.config, self._mesh)),
            np.int32,
        )
        padded_BL[:rows, :length] = flat.reshape(array.shape)
        graphdef, state = nnx.split(self.model)
        logits_BLV = _logits(graphdef, state, place(padded_BL, self._mesh), mesh=self._mesh)
        return np.asarray(logits_BLV)[:rows, :length]

    def score(
        self,
        pairs: Sequence[tuple[str | Sequence[int], str | Sequence[int]]],
        *,
        batch_tokens: int = scoring.BATCH_TOKENS,
        stride: int | None = None,
        names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> list[Score]:
        """Log-likelihood of every continuation given its context; see `evaluation.scoring.score`.

        Args:
          pairs: (context, continuation), each as text or as token ids. Texts are encoded apart,
            nothing is added. An empty context stands for the tokenizer's beginning-of-text token,
            or end of text if it has none.
          batch_tokens, stride, names, progress: see `evaluation.scoring.score`.

        Raises:
          UserError: text without a tokenizer, an empty continuation, an id outside the vocabulary.
        """
        return scoring.score(
            self.model,
            self._encode_pairs(pairs),
            batch_tokens=batch_tokens,
            stride=stride,
            names=names,
            prefix_id=self._prefix_id(),
            mesh=self._mesh,
            progress=progress,
        )

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        **kwargs,
    ) -> list[str] | list[list[int]]:
        """The new text of every prompt, or the new token ids of prompts that are token ids;
        arguments as for `complete` and `generate_ids`.
        """
        if not isinstance(prompts, str) and not any(isinstance(each, str) for each in prompts):
            ids = cast(Sequence[Sequence[int]], prompts)
            return self.generate_ids(ids, max_new_tokens=max_new_tokens, **kwargs)
        texts = cast(str | Sequence[str], prompts)
        return [each.text for each in self.complete(texts, max_new_tokens=max_new_tokens, **kwargs)]

    def complete(
        self, prompts: str | Sequence[str], *, max_new_tokens: int = 128, **kwargs
    ) -> list[TextCompletion]:
        """Continues every prompt; see `generation.text.complete_text` for the other arguments.

        An empty prompt stands for the beginning of a text. Rows end at `stop_token_ids` of this
        handle unless others are given.

        Raises:
          UserError: no tokenizer, a prompt that fills the model's context, or a sampling parameter
            out of its range.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UserError("prompts must be all texts or all lists of token ids")
        kwargs.setdefault("stop_token_ids", self.stop_token_ids)
        return text.complete_text(
            self.model,
            self._needed_tokenizer(),
            prompts,
            max_new_tokens=max_new_tokens,
            prefix_id=self._prefix_id(),
            mesh=self._mesh,
            **kwargs,
        )

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 128, **kwargs
    ) -> list[list[int]]:
        """The new tokens of every prompt; see `generation.decoding.complete` for the other
        arguments.

        Rows end at `stop_token_ids` of this handle unless others are given.
        """
        kwargs.setdefault("stop_token_ids", self.stop_token_ids)
        return decoding.generate(
            self.model, prompts, max_new_tokens=max_new_tokens, mesh=self._mesh, **kwargs
        )

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            where = "this model" if self._path is None else os.fspath(self._path)
            raise UserError(
                f"{where}: no tokenizer.json beside the model; put one there, or give token ids"
            )
        return self.tokenizer

    def _prefix_id(self) -> int | None:
        return None if self.tokenizer is None else scoring.prefix_token(self.tokenizer)

    def _encode_pairs(self, pairs) -> list[tuple[Sequence[int], Sequence[int]]]:
        texts = list(
            dict.fromkeys(part for pair in pairs for part in pair if isinstance(part, str))
        )
        ids = {}
        if texts:
            tokenizer = self._needed_tokenizer()
            ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))

        def encoded(part):
            return ids[part] if isinstance(part, str) else part

        return [(encoded(context), encoded(continuation)) for context, continuation in pairs]


def _is_ours(directory: epath.Path) -> bool:
    names = (checkpoint_files.METADATA, checkpoint_files.STATE, "checkpoints")
    return any((directory / name).exists() for name in names) or bool(
        checkpoint_files.step_directories(directory)
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _logits(graphdef, state, tokens_BL, *, mesh: Mesh | None) -> jax.Array:
    with sharding.use_mesh(mesh):
        logits_BLV = nnx.merge(graphdef, state)(tokens_BL)
    if mesh is not None:
        logits_BLV = jax.lax.with_sharding_constraint(logits_BLV, sharding.replicated(mesh))
    return logits_BLV
