"""Log-likelihood of continuations given their contexts."""

import collections
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
from olmax.generation.batching import as_ids, length_bucket, mesh_of, place, row_bucket
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


@dataclasses.dataclass
class _Row:
    """One row of a forward pass: continuations that share all of its input."""

    input_L: np.ndarray
    targets: list[np.ndarray] = dataclasses.field(default_factory=list)
    pairs: list[int] = dataclasses.field(default_factory=list)


class _Shape(NamedTuple):
    """Padded sizes: input length, scored positions, continuations a row."""

    length: int
    positions: int
    continuations: int


def score(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    stride: int | None = None,
    prefix_id: int | None = None,
    share_inputs: bool = True,
    names: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> list[Score]:
    """Scores (context, continuation) pairs of token ids, results in the order of `pairs`.

    Context and continuation are joined; nothing is added. The model reads all but the last token,
    and the context loses tokens on its left until that fits `max_seq_len`. A continuation longer
    than `max_seq_len` is scored in consecutive pieces, each given as many of the tokens before it
    as fit (the rolling log-likelihood of lm-eval), and a warning is logged.

    Pairs are sorted by length into batches of few shapes. Only the logits of continuation tokens
    are computed, `LOGITS_TOKENS` positions at a time.

    Args:
      model: on one device or on a mesh.
      pairs: token ids; the continuation is not empty.
      batch_tokens: tokens of a forward pass, padding included, for each piece of the batch that the
        mesh makes.
      stride: score at most so many tokens a forward pass (up to `max_seq_len`, which is the
        default). Smaller: more context for every token of a long continuation, at a higher cost.
      prefix_id: the token that an empty context stands for, as lm-eval does with the beginning- or
        end-of-text token; see `prefix_token`.
      share_inputs: run continuations whose inputs are the same (the single-token answers of a
        multiple-choice question) as one row.
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
    rows, lengths = _rows(model, pairs, names, stride, prefix_id, share_inputs)
    groups = _group(rows, model, batch_tokens, mesh)

    logprobs, greedy = np.zeros(len(pairs)), np.ones(len(pairs), bool)

    def collect(batch: list[_Row], outputs) -> None:
        logprob_BTK, greedy_BTK = jax.device_get(outputs)
        for i, row in enumerate(batch):
            for k, (pair, targets) in enumerate(zip(row.pairs, row.targets, strict=True)):
                logprobs[pair] += logprob_BTK[i, : len(targets), k].sum(dtype=np.float64)
                greedy[pair] &= greedy_BTK[i, : len(targets), k].all()

    graphdef, state = nnx.split(model)
    pending = None
    with tqdm(
        total=len(rows), desc="scoring", unit="row", disable=None if progress else True
    ) as bar:
        # The longest first: what does not fit into memory says so at once.
        for shape, members in reversed(groups):
            for batch in _batches(members, shape, batch_tokens, mesh):
                arrays = _arrays(batch, shape, mesh)
                outputs = _score_batch(graphdef, state, *arrays, mesh=mesh)
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


def windows(
    context: np.ndarray, continuation: np.ndarray, max_len: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(input, targets) pieces that together score every token of the continuation once.

    The targets of a piece follow the last `len(targets)` positions of its input, which holds at
    most `max_len` tokens. The context is not empty.
    """
    tokens = np.concatenate([context, continuation])
    for start in range(len(context), len(tokens), stride):
        stop = min(start + stride, len(tokens))
        yield tokens[max(0, stop - 1 - max_len) : stop - 1], tokens[start:stop]


def _rows(
    model: Decoder,
    pairs,
    names: Sequence[str],
    stride: int,
    prefix_id: int | None,
    share_inputs: bool,
) -> tuple[list[_Row], list[int]]:
    config = model.config
    rows: list[_Row] = []
    shared: dict[tuple[bytes, int], _Row] = {}
    lengths, long = [], 0
    for number, (context, continuation) in enumerate(pairs):
        where = names[number]
        context_ids = as_ids(context, config, f"{where}, context")
        continuation_ids = as_ids(continuation, config, f"{where}, continuation")
        if not continuation_ids.size:
            raise UserError(f"{where}: the continuation is empty; there is nothing to score")
        if not context_ids.size:
            if prefix_id is None:
                raise UserError(
                    f"{where}: the context is empty; give prefix_id, the token that stands for it"
                )
            context_ids = as_ids([prefix_id], config, "prefix_id")
        lengths.append(len(continuation_ids))
        long += len(continuation_ids) > config.max_seq_len
        for input_L, targets in windows(context_ids, continuation_ids, config.max_seq_len, stride):
            key = (input_L.tobytes(), len(targets))
            row = shared.get(key) if share_inputs else None
            if row is None:
                row = _Row(input_L)
                rows.append(row)
                shared[key] = row
            row.targets.append(targets)
            row.pairs.append(number)
    if long and stride == config.max_seq_len:
        logging.getLogger(__name__).warning(
            "%d continuations are longer than the context of %d tokens; they are scored in pieces",
            long,
            config.max_seq_len,
        )
    return rows, lengths


def _power_of_four(n: int) -> int:
    return 1 << (((n - 1).bit_length() + 1) // 2 * 2)


def _shape(row: _Row, model: Decoder, mesh: Mesh | None) -> _Shape:
    length = length_bucket(len(row.input_L), model.config, mesh)
    positions = min(max(4, _power_of_four(len(row.targets[0]))), length)
    return _Shape(length, positions, _power_of_four(len(row.targets)))


def _group(
    rows: list[_Row], model: Decoder, batch_tokens: int, mesh: Mesh | None
) -> list[tuple[_Shape, list[_Row]]]:
    """Rows by the shape they are padded to, the shortest first.

    Shapes with less than a batch of rows are pooled: a little padding costs less than compiling.
    """
    exact: dict[_Shape, list[_Row]] = collections.defaultdict(list)
    for row in rows:
        exact[_shape(row, model, mesh)].append(row)
    groups: list[tuple[_Shape, list[_Row]]] = []
    pool: list[_Row] = []
    pooled = _Shape(0, 0, 0)
    for shape, members in sorted(exact.items(), key=lambda item: item[0]):
        if len(members) * shape.length >= batch_tokens:
            groups.append((shape, members))
            continue
        pool += members
        pooled = _Shape(*map(max, pooled, shape))
        if len(pool) * pooled.length >= batch_tokens:
            groups.append((pooled, pool))
            pool, pooled = [], _Shape(0, 0, 0)
    if pool:
        groups.append((pooled, pool))
    return sorted(groups, key=lambda group: group[0])


def _batches(
    rows: list[_Row], shape: _Shape, batch_tokens: int, mesh: Mesh | None
) -> Iterator[list[_Row]]:
    shards = 1 if mesh is None else sharding.batch_shards(mesh)
    # Rounded down to a power of two, the row counts that batches are padded to.
    size = shards << (max(1, batch_tokens // shape.length).bit_length() - 1)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _arrays(rows: list[_Row], shape: _Shape, mesh: Mesh | None) -> tuple[jax.Array, ...]:
    count = row_bucket(len(rows), mesh)
    # The positions are cut into equal pieces of at most LOGITS_TOKENS logits (see _score_batch).
    piece = _piece(count, shape.positions)
    padded = -(-shape.positions // piece) * piece
    tokens_BL = np.zeros((count, shape.length), np.int32)
    positions_BT = np.zeros((count, padded), np.int32)
    targets_BTK = np.zeros((count, padded, shape.continuations), np.int32)
    for i, row in enumerate(rows):
        length, scored = len(row.input_L), len(row.targets[0])
        tokens_BL[i, :length] = row.input_L
        positions_BT[i, :scored] = np.arange(length - scored, length)
        for k, targets in enumerate(row.targets):
            targets_BTK[i, :scored, k] = targets
    return (
        place(tokens_BL, mesh),
        place(positions_BT, mesh, batch_only=True),
        place(targets_BTK, mesh, batch_only=True),
    )


def _piece(rows: int, positions: int) -> int:
    fitting = max(1, LOGITS_TOKENS // rows)
    return min(positions, 1 << (fitting.bit_length() - 1))


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _score_batch(
    graphdef, state, tokens_BL, positions_BT, targets_BTK, *, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """(log-probability float32, whether it is the most likely token bool), both [B, T, K], of
    `targets_BTK` after the positions `positions_BT`. T is a multiple of `_piece`.
    """
    model = nnx.merge(graphdef, state)
    rows, positions, continuations = targets_BTK.shape
    piece = _piece(rows, positions)

    def one(xs):
        hidden_BCD, targets_BCK = xs
        logits_BCV = model.logits(hidden_BCD)
        lse_BC1 = jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)
        target_BCK = jnp.take_along_axis(logits_BCV, targets_BCK, axis=-1)
        best_BC1 = jnp.argmax(logits_BCV, axis=-1, keepdims=True)
        return target_BCK - lse_BC1, targets_BCK == best_BC1

    def pieces(x):
        return jnp.moveaxis(x.reshape(rows, -1, piece, x.shape[-1]), 1, 0)

    with sharding.use_mesh(mesh):
        # Rows are padded on the right, where causal attention does not look.
        hidden_BLD = model.hidden(tokens_BL)
        # Only the hidden states that predict a target meet the vocabulary.
        hidden_BTD = jnp.take_along_axis(hidden_BLD, positions_BT[:, :, None], axis=1)
        outputs = jax.lax.map(one, (pieces(hidden_BTD), pieces(targets_BTK)))

    def whole(x):
        x = jnp.moveaxis(x, 0, 1).reshape(rows, positions, continuations)
        # Every process reads all results.
        return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding.replicated(mesh))

    return whole(outputs[0]), whole(outputs[1])
