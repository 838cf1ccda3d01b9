"""Log-likelihood of continuations given their contexts."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from olmax import sharding
from olmax.errors import UserError
from olmax.evaluation.rows import Row, Shape, group, make_rows
from olmax.generation.batching import mesh_of, place, row_bucket
from olmax.models.decoder import Decoder

LOGITS_TOKENS = 1024
"""Positions whose logits exist at one time."""

BATCH_TOKENS = 16384

_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>")


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of one continuation."""

    logprob: float
    """Natural logarithm of its probability, the sum over its tokens."""
    tokens: int
    """Number of tokens of the continuation."""
    is_greedy: bool
    """Whether greedy decoding would produce exactly this continuation."""


def score(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    stride: int | None = None,
    prefix_id: int | None = None,
    share_contexts: bool = True,
    names: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> list[Score]:
    """Scores (context, continuation) pairs of token ids, results in the order of `pairs`.

    Context and continuation are joined; nothing is added. The model reads all but the last token,
    and the context loses tokens on its left until that fits `max_seq_len`. A continuation longer
    than `max_seq_len` is scored in consecutive pieces, each given as many of the tokens before it
    as fit (the rolling log-likelihood of lm-eval), and a warning is logged.

    Continuations of one context are branches of one row, which reads the context once. Rows are
    sorted by length into batches of few shapes. Only the logits of continuation tokens are
    computed, `LOGITS_TOKENS` positions at a time.

    Args:
      model: on one device or on a mesh.
      pairs: token ids; the continuation is not empty.
      batch_tokens: tokens of a forward pass, padding included, for each piece of the batch that the
        mesh makes.
      stride: score at most so many tokens a forward pass (up to `max_seq_len`, which is the
        default). Smaller: more context for every token of a long continuation, at a higher cost.
      prefix_id: the token that an empty context stands for, as lm-eval does with the beginning- or
        end-of-text token; see `prefix_token`.
      share_contexts: read a context that several pairs have once (not where experts choose their
        tokens, which would choose among all branches).
      names: what error messages call the pairs, such as file and line.
      mesh: where batches go; None: the mesh that the model lies on.
      progress: show a progress bar.

    Raises:
      UserError: an empty continuation, an id outside the vocabulary, or an empty context and no
        `prefix_id`.
    """
    config = model.config
    mesh = mesh_of(model) if mesh is None else mesh
    if stride is not None and not 0 < stride <= config.max_seq_len:
        raise UserError(f"stride {stride} must be between 1 and max_seq_len={config.max_seq_len}")
    names = names or [f"pair {i}" for i in range(len(pairs))]
    stride = stride or config.max_seq_len
    rows, lengths = make_rows(
        config, pairs, names, stride=stride, prefix_id=prefix_id, share_contexts=share_contexts
    )
    long = sum(length > config.max_seq_len for length in lengths)
    if long and stride == config.max_seq_len:
        logging.getLogger(__name__).warning(
            "%d continuations are longer than the context of %d tokens; they are scored in pieces",
            long,
            config.max_seq_len,
        )

    logprobs, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)

    def collect(batch: list[Row], outputs) -> None:
        logprob_BT, greedy_BT = jax.device_get(outputs)
        for i, row in enumerate(batch):
            start = 0
            for pair, branch in zip(row.pairs, row.branches, strict=True):
                stop = start + len(branch)
                logprobs[pair] += logprob_BT[i, start:stop].sum(dtype=np.float64)
                greedy[pair] &= greedy_BT[i, start:stop].all()
                start = stop

    graphdef, state = nnx.split(model)
    pending = None
    with tqdm(
        total=len(rows), desc="scoring", unit="row", disable=None if progress else True
    ) as bar:
        # The longest first: what does not fit into memory says so at once.
        for shape, members in reversed(group(rows, config, mesh)):
            for batch in _batches(members, shape, batch_tokens, mesh):
                arrays = _arrays(batch, shape, mesh)
                outputs = _score_batch(graphdef, state, arrays, mesh=mesh)
                # One batch behind, so that the device never waits for the host.
                if pending is not None:
                    collect(*pending)
                pending = batch, outputs
                bar.update(len(batch))
        if pending is not None:
            collect(*pending)
    return [
        Score(float(logprob), length, bool(is_greedy))
        for logprob, length, is_greedy in zip(logprobs, lengths, greedy, strict=True)
    ]


def prefix_token(tokenizer) -> int:
    """The token that stands for an empty context: beginning of text where the tokenizer has such a
    token, else end of text (what precedes every document in training).
    """
    ids = (tokenizer.token_to_id(name) for name in _BOS_NAMES)
    return next((i for i in ids if i is not None), tokenizer.eos_id)


def _batches(
    rows: list[Row], shape: Shape, batch_tokens: int, mesh: Mesh | None
) -> Iterator[list[Row]]:
    shards = 1 if mesh is None else sharding.batch_shards(mesh)
    # Rounded down to a power of two, the row counts that batches are padded to.
    size = shards << (max(1, batch_tokens // shape.length).bit_length() - 1)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


class _Arrays(NamedTuple):
    """A batch on the devices, int32."""

    tokens_BL: jax.Array
    positions_BL: jax.Array | None
    subsegment_ids_BL: jax.Array | None
    """Both None: rows without branches, whose tokens see all before them."""
    predicting_BT: jax.Array
    """Places in the row that predict the targets."""
    targets_BT: jax.Array


def _arrays(rows: list[Row], shape: Shape, mesh: Mesh | None) -> _Arrays:
    count = row_bucket(len(rows), mesh)
    # The targets are cut into equal pieces of at most LOGITS_TOKENS logits (see _score_batch).
    piece = _piece(count, shape.scored)
    padded = -(-shape.scored // piece) * piece
    tokens_BL, positions_BL, subsegment_ids_BL = np.zeros((3, count, shape.length), np.int32)
    predicting_BT, targets_BT = np.zeros((2, count, padded), np.int32)
    for i, row in enumerate(rows):
        tokens_BL[i, : row.length] = row.tokens_L()
        positions_BL[i, : row.length] = row.positions_L()
        subsegment_ids_BL[i, : row.length] = row.subsegment_ids_L()
        predicting_BT[i, : row.scored] = row.predicting_T()
        targets_BT[i, : row.scored] = np.concatenate(row.branches)
    return _Arrays(
        place(tokens_BL, mesh),
        place(positions_BL, mesh) if shape.branched else None,
        place(subsegment_ids_BL, mesh) if shape.branched else None,
        place(predicting_BT, mesh, batch_only=True),
        place(targets_BT, mesh, batch_only=True),
    )


def _piece(rows: int, scored: int) -> int:
    fitting = max(1, LOGITS_TOKENS // rows)
    return min(scored, 1 << (fitting.bit_length() - 1))


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _score_batch(
    graphdef, state, batch: _Arrays, *, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """(log-probability float32, whether it is the most likely token bool), both [B, T], of the
    targets. T is a multiple of `_piece`.
    """
    model = nnx.merge(graphdef, state)
    rows, scored = batch.targets_BT.shape
    piece = _piece(rows, scored)

    def one(xs):
        hidden_BCD, targets_BC = xs
        logits_BCV = model.logits(hidden_BCD)
        lse_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
        return target_BC1[..., 0] - lse_BC, targets_BC == jnp.argmax(logits_BCV, axis=-1)

    def pieces(x):
        return jnp.moveaxis(x.reshape(rows, -1, piece, *x.shape[2:]), 1, 0)

    with sharding.use_mesh(mesh):
        # Rows are padded on the right, where causal attention does not look.
        hidden_BLD = model.hidden(
            batch.tokens_BL,
            positions_BL=batch.positions_BL,
            subsegment_ids_BL=batch.subsegment_ids_BL,
        )
        # Only the hidden states that predict a target meet the vocabulary.
        hidden_BTD = jnp.take_along_axis(hidden_BLD, batch.predicting_BT[..., None], axis=1)
        outputs = jax.lax.map(one, (pieces(hidden_BTD), pieces(batch.targets_BT)))

    def whole(x):
        x = jnp.moveaxis(x, 0, 1).reshape(rows, scored)
        # Every process reads all results.
        return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))

    return whole(outputs[0]), whole(outputs[1])
