"""Perplexity and bits per byte on held-out text."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from olmax import sharding
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.evaluation import scoring
from olmax.generation.batching import mesh_of
from olmax.models.cross_entropy import cross_entropy
from olmax.models.decoder import Decoder
from olmax.reporting import estimates
from olmax.reporting.estimates import Estimate
from olmax.training.objectives import next_token_targets


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What a model makes of one source of text."""

    bits_per_byte: Estimate
    """All bits over all UTF-8 bytes; the standard error is over documents."""
    nats_per_token: Estimate
    documents: int
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(self.nats_per_token.value)


def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Mapping[str, Sequence[str]],
    *,
    stride: int | None = None,
    batch_tokens: int = scoring.BATCH_TOKENS,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, Perplexity]:
    """Perplexity of each source's documents.

    Every token of a document is scored once. The first follows the end-of-text token (or the
    tokenizer's beginning of text), as in training; a document longer than the context is cut into
    pieces that do not overlap, or into pieces of `stride` tokens given as many tokens before them
    as fit.

    Args:
      model: on one device or on a mesh.
      tokenizer: of the model.
      documents: texts by the name of their source.
      stride, batch_tokens, mesh, progress: see `scoring.score`.

    Raises:
      UserError: a source without text.
    """
    texts = [(source, text) for source, group in documents.items() for text in group if text]
    for source in documents:
        if not any(name == source for name, _ in texts):
            raise UserError(f"perplexity: source {source!r} holds no text")
    pairs = [([], ids) for ids in tokenizer.encode_batch([text for _, text in texts])]
    scores = scoring.score(
        model,
        pairs,
        stride=stride or model.config.max_seq_len,
        batch_tokens=batch_tokens,
        prefix_id=scoring.prefix_token(tokenizer),
        mesh=mesh,
        progress=progress,
    )
    found = {}
    for source in documents:
        mine = [
            (score, len(text.encode()))
            for score, (name, text) in zip(scores, texts, strict=True)
            if name == source
        ]
        nats = [-score.logprob for score, _ in mine]
        tokens, sizes = [score.tokens for score, _ in mine], [size for _, size in mine]
        found[source] = Perplexity(
            bits_per_byte=estimates.ratio([x / math.log(2) for x in nats], sizes),
            nats_per_token=estimates.ratio(nats, tokens),
            documents=len(mine),
            tokens=sum(tokens),
            bytes=sum(sizes),
        )
    return found


def batch_losses(
    model: Decoder,
    batches: Iterable[Mapping[str, np.ndarray]],
    sources: Sequence[str],
    *,
    mesh: Mesh | None = None,
) -> dict[str, Estimate]:
    """Mean next-token loss in nats per source, over the batches of a loader.

    Which tokens count is decided as in training (loss mask, segments, padding). The standard error
    is over rows; sources that do not occur are left out.

    Args:
      model: on one device or on a mesh.
      batches: with `tokens` int32 [B, L] and, for more than one source, `source` int32 [B]; B is
        this process's part of the batch.
      sources: names by source number.
      mesh: where batches go; None: the mesh that the model lies on.

    Raises:
      UserError: a batch without `source` although there are several.
    """
    mesh = mesh_of(model) if mesh is None else mesh
    graphdef, state = nnx.split(model)
    losses, counts, numbers = [], [], []
    for batch in batches:
        if "source" not in batch and len(sources) > 1:
            raise UserError("batch_losses: the batches do not say which source a row is from")
        arrays = {key: _from_process(value, mesh) for key, value in batch.items()}
        rows = _row_losses(graphdef, state, arrays, mesh=mesh)
        loss_B, count_B, source_B = (np.asarray(x) for x in jax.device_get(rows))
        losses.append(loss_B)
        counts.append(count_B)
        numbers.append(source_B)
    loss, count, number = map(np.concatenate, (losses, counts, numbers))
    found = {}
    for i, name in enumerate(sources):
        mine = (number == i) & (count > 0)
        if mine.any():
            found[name] = estimates.ratio(loss[mine].tolist(), count[mine].tolist())
    return found


def _from_process(x: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(x)
    return jax.make_array_from_process_local_data(sharding.batch_sharding(mesh, x.ndim), x)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _row_losses(
    graphdef, state, batch: dict[str, jax.Array], *, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Summed loss float32, number of targets int32, source int32, each [B]."""
    model = nnx.merge(graphdef, state)
    with sharding.use_mesh(mesh):
        hidden_BLD = model.hidden(
            batch["tokens"],
            positions_BL=batch.get("positions"),
            segment_ids_BL=batch.get("segment_ids"),
        )
        targets_BL, valid_BL = next_token_targets(batch)
        loss_BL, _ = cross_entropy(
            hidden_BLD,
            model.head_kernel(),
            targets_BL,
            implementation=model.execution.loss,
        )
    loss_B = jnp.sum(jnp.where(valid_BL, loss_BL, 0.0), axis=1)
    source_B = batch.get("source", jnp.zeros(loss_B.shape, jnp.int32))
    rows = loss_B, jnp.sum(valid_BL, axis=1), source_B
    if mesh is not None:
        rows = jax.lax.with_sharding_constraint(rows, sharding.replicated(mesh))
    return rows
