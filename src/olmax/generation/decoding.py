"""Generating token ids: prefill and decoding over the models' KV cache.

In the contiguous cache prompts of a batch end at the same slot (they are padded on the left), so
that all rows write their next token to the same slot. In the paged cache every row has pages for
its own length: short prompts are read apart from long ones, and attention ends where a row does.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from olmax import sharding
from olmax.errors import UserError
from olmax.generation.batching import as_ids, bucket, mesh_of, place, row_bucket
from olmax.generation.paging import PAGE, page_table, prompt_groups
from olmax.generation.sampling import Sampling, row_key, sample
from olmax.models.config import DecoderConfig
from olmax.models.decoder import Decoder
from olmax.models.kv_cache import KVCache, init_cache
from olmax.models.paged_cache import PAGES, PagedCache, init_paged_cache

PREFILL_TOKENS = 512
"""Tokens of a row that are read at one time: bounds the attention scores that exist at once."""

ROUND_STEPS = 32
"""Tokens a row between two looks of the host."""

WATCHED_STEPS = 8
"""The same while somebody watches."""

BATCH_SIZE = 32

CacheKind = Literal["contiguous", "paged"]

OnToken = Callable[[int, int], bool | None]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model made of one prompt."""

    ids: list[int]
    """New tokens, the stop token not among them."""
    finish_reason: Literal["stop", "length"]
    """`stop`: a stop token came, or `on_token` asked for it. `length`: `max_new_tokens` or the end
    of the model's context was reached."""


def complete(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    stop_token_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    batch_size: int = BATCH_SIZE,
    names: Sequence[str] | None = None,
    mesh: Mesh | None = None,
    cache: CacheKind = "paged",
    progress: bool = False,
) -> list[Completion]:
    """Continues every prompt, results in the order of `prompts`.

    Prompt and new tokens together stay within `max_seq_len`: a row that reaches it ends there with
    `finish_reason` "length".

    Args:
      model: on one device or on a mesh.
      prompts: token ids, at least one each.
      max_new_tokens: tokens a row at most.
      temperature, top_p, top_k: see `sampling.Sampling`.
      seed: an integer: row i draws from (seed, i), whatever is beside it in its batch. A sequence:
        row i draws as the only row of a call with seed `seed[i]` would.
      stop_token_ids: tokens that end a row.
      on_token: called as `on_token(row, token)` for every new token, in the order of each row;
        returning True ends the row after this token.
      batch_size: rows generated at one time; those of similar length go together.
      names: what error messages call the prompts, such as file and line.
      mesh: where batches go; None: the mesh that the model lies on.
      cache: layout of the keys and values; changes nothing beyond rounding. `paged`: a row takes
        time and memory for its own length. `contiguous`: all rows for that of the longest.
      progress: show a progress bar.

    Raises:
      UserError: an empty prompt, one that fills the context, an id outside the vocabulary, or a
        sampling parameter out of its range.
    """
    config = model.config
    mesh = mesh_of(model) if mesh is None else mesh
    sampling = Sampling(temperature, top_p, top_k)
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be at least 1"
        )
    if cache not in get_args(CacheKind):
        raise UserError(f"cache {cache!r} is none of {', '.join(get_args(CacheKind))}")
    stops = as_ids(list(stop_token_ids), config, "stop_token_ids")
    names = names or [f"prompt {i}" for i in range(len(prompts))]
    rows = []
    for i, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        ids = _checked(prompt, name, config)
        rows.append(_Row(i, ids, min(max_new_tokens, config.max_seq_len - len(ids))))
    keys = _row_seeds(seed, len(rows))
    rows.sort(key=lambda row: len(row.prompt))
    # None: only where somebody watches.
    disable = None if progress else True
    with tqdm(total=len(rows), desc="generating", unit="prompt", disable=disable) as bar:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            seeds = [keys[row.number] for row in batch]
            _generate_batch(model, batch, seeds, sampling, stops, on_token, mesh, cache)
            bar.update(len(batch))
    rows.sort(key=lambda row: row.number)
    return [Completion(row.ids, "stop" if row.stopped else "length") for row in rows]


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **kwargs
) -> list[list[int]]:
    """The new tokens of every prompt; see `complete`."""
    completions = complete(model, prompts, max_new_tokens=max_new_tokens, **kwargs)
    return [completion.ids for completion in completions]


@dataclasses.dataclass
class _Row:
    number: int
    prompt: np.ndarray
    limit: int
    """New tokens at most."""
    ids: list[int] = dataclasses.field(default_factory=list)
    stopped: bool = False

    @property
    def done(self) -> bool:
        return self.stopped or len(self.ids) >= self.limit


def _row_seeds(seed: int | Sequence[int], rows: int) -> list[tuple[int, int]]:
    """(seed, number) of every row; see `sampling.row_key`."""
    if isinstance(seed, int | np.integer):
        keys = [(int(seed), i) for i in range(rows)]
    elif len(seed) == rows:
        keys = [(int(s), 0) for s in seed]
    else:
        raise UserError(f"{len(seed)} seeds for {rows} prompts; give one each, or one for all")
    for value, _ in keys:
        if not 0 <= value < 2**32:
            raise UserError(f"seed {value} must be from 0 to {2**32 - 1}")
    return keys


def _checked(prompt: Sequence[int], name: str, config: DecoderConfig) -> np.ndarray:
    ids = as_ids(prompt, config, name)
    if not ids.size:
        raise UserError(f"{name}: the prompt is empty; give at least one token")
    if ids.size >= config.max_seq_len:
        raise UserError(
            f"{name}: the prompt has {ids.size} tokens, which leaves no room to generate in the "
            f"model's context of {config.max_seq_len}; shorten it to at most "
            f"{config.max_seq_len - 1}"
        )
    return ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _State:
    """Between two steps: everything of a batch that lives on the devices."""

    cache: KVCache | PagedCache
    hidden_BD: jax.Array
    """At the newest token: what the next one is drawn from."""
    position_B: jax.Array
    """int32: position of the next token."""
    done_B: jax.Array
    step: jax.Array
    """int32 scalar: tokens drawn so far."""


def _generate_batch(
    model: Decoder,
    rows: list[_Row],
    keys: list[tuple[int, int]],
    sampling: Sampling,
    stops: np.ndarray,
    on_token: OnToken | None,
    mesh: Mesh | None,
    cache: CacheKind,
) -> None:
    graphdef, params = nnx.split(model)
    count = row_bucket(len(rows), mesh)
    # Rows that only fill the batch are done from the start.
    done_B = np.ones(count, bool)
    done_B[: len(rows)] = False
    read = _read_paged if cache == "paged" else _read_contiguous
    state = read(graphdef, params, rows, done_B, mesh)
    seeds_B2 = np.zeros((count, 2), np.uint32)
    seeds_B2[: len(rows)] = keys
    # A fixed number of stop tokens would limit them; a padded list only adds -1, which no token is.
    stops_P = np.full(bucket(len(stops), minimum=4), -1, np.int32)
    stops_P[: len(stops)] = stops
    round_steps = ROUND_STEPS if on_token is None else WATCHED_STEPS

    while not done_B.all():
        left = max(row.limit - len(row.ids) for row in rows if not row.done)
        steps = min(left, round_steps)
        state, tokens_BT = _decode_round(
            graphdef,
            params,
            dataclasses.replace(state, done_B=place(done_B, mesh)),
            place(seeds_B2, mesh, batch_only=True),
            stops_P,
            np.int32(steps),
            np.float32(sampling.temperature or 1.0),
            np.int32(sampling.top_k),
            np.float32(sampling.top_p),
            greedy=sampling.greedy,
            filters=sampling.filters,
            mesh=mesh,
        )
        tokens_BT = np.asarray(jax.device_get(tokens_BT))
        for step in range(steps):
            for i, row in enumerate(rows):
                if not row.done:
                    _append(row, int(tokens_BT[i, step]), stops, on_token)
        done_B[: len(rows)] = [row.done for row in rows]


def _read_contiguous(graphdef, params, rows: list[_Row], done_B: np.ndarray, mesh: Mesh | None):
    """The state after the prompts, in a contiguous cache."""
    count = len(done_B)
    longest = max(len(row.prompt) for row in rows)
    piece = min(bucket(longest, minimum=16), PREFILL_TOKENS)
    length = -(-longest // piece) * piece
    capacity = bucket(length + max(row.limit for row in rows), minimum=64)
    tokens_BL = np.zeros((count, length), np.int32)
    segments_BL = np.zeros((count, length), np.int32)
    for i, row in enumerate(rows):
        tokens_BL[i, length - len(row.prompt) :] = row.prompt
        segments_BL[i, length - len(row.prompt) :] = 1

    state = _empty_state(graphdef, params, place(done_B, mesh), capacity=capacity, mesh=mesh)
    for start in range(0, length, piece):
        part = slice(start, start + piece)
        state = _prefill(
            graphdef,
            params,
            state,
            place(tokens_BL[:, part], mesh, batch_only=True),
            place(segments_BL[:, part], mesh, batch_only=True),
            first=start == 0,
            mesh=mesh,
        )
    return state


def _read_paged(graphdef, params, rows: list[_Row], done_B: np.ndarray, mesh: Mesh | None):
    """The state after the prompts, in a paged cache."""
    count = len(done_B)
    tokens = [len(row.prompt) + row.limit for row in rows]
    shards = 1 if mesh is None else sharding.batch_shards(mesh)
    table_BT, pages = page_table(tokens + [0] * (count - len(rows)), shards)
    state = _empty_paged_state(
        graphdef,
        params,
        place(done_B, mesh),
        place(table_BT, mesh, batch_only=True),
        pages=pages,
        mesh=mesh,
    )
    lengths = [len(row.prompt) for row in rows]
    # On a mesh a row stays on its device.
    groups = prompt_groups(lengths) if mesh is None else [list(range(len(rows)))]
    for group in groups:
        longest = max(lengths[row] for row in group)
        piece = min(bucket(longest, minimum=16), PREFILL_TOKENS)
        padded = count if mesh is not None else row_bucket(len(group), mesh)
        # Beyond the batch: rows that only fill the group.
        rows_G = np.full(padded, count, np.int32)
        rows_G[: len(group)] = group
        for start in range(0, longest, piece):
            tokens_GL = np.zeros((padded, piece), np.int32)
            real_GL = np.zeros((padded, piece), np.int32)
            for i, row in enumerate(group):
                part = rows[row].prompt[start : start + piece]
                tokens_GL[i, : len(part)] = part
                real_GL[i, : len(part)] = 1
            state = _prefill_paged(
                graphdef,
                params,
                state,
                place(tokens_GL, mesh, batch_only=True),
                place(real_GL, mesh, batch_only=True),
                None if mesh is not None else rows_G,
                first=start == 0,
                mesh=mesh,
            )
    return state


def _append(row: _Row, token: int, stops: np.ndarray, on_token: OnToken | None) -> None:
    if token in stops:
        row.stopped = True
        return
    row.ids.append(token)
    if on_token is not None and on_token(row.number, token):
        row.stopped = True


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity", "mesh"))
def _empty_state(graphdef, params, done_B, *, capacity: int, mesh: Mesh | None) -> _State:
    model = nnx.merge(graphdef, params)
    config, dtype = model.config, model.execution.compute_dtype
    (batch,) = done_B.shape
    cache = init_cache(config, batch, capacity, dtype)
    if mesh is not None:
        rules = sharding.DEFAULT_RULES
        keys = NamedSharding(mesh, rules.spec(("layers", "batch", None, "kv_heads", None)))
        slots = NamedSharding(mesh, rules.spec(("batch", None)))
        constrain = jax.lax.with_sharding_constraint
        cache = dataclasses.replace(
            cache,
            k_NBSKH=constrain(cache.k_NBSKH, keys),
            v_NBSKH=constrain(cache.v_NBSKH, keys),
            segment_ids_BS=constrain(cache.segment_ids_BS, slots),
        )
    return _State(
        cache,
        jnp.zeros((batch, config.d_model), dtype),
        jnp.zeros(batch, jnp.int32),
        done_B,
        jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "pages", "mesh"))
def _empty_paged_state(
    graphdef, params, done_B, table_BT, *, pages: int, mesh: Mesh | None
) -> _State:
    model = nnx.merge(graphdef, params)
    config, dtype = model.config, model.execution.compute_dtype
    (batch,) = done_B.shape
    cache = init_paged_cache(config, table_BT, pages, PAGE, dtype)
    if mesh is not None:
        placement = NamedSharding(mesh, sharding.DEFAULT_RULES.spec(PAGES))
        constrain = jax.lax.with_sharding_constraint
        cache = dataclasses.replace(
            cache,
            k_NPSC=constrain(cache.k_NPSC, placement),
            v_NPSC=constrain(cache.v_NPSC, placement),
        )
    return _State(
        cache,
        jnp.zeros((batch, config.d_model), dtype),
        jnp.zeros(batch, jnp.int32),
        done_B,
        jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "first", "mesh"), donate_argnames="state")
def _prefill_paged(
    graphdef, params, state: _State, tokens_GL, real_GL, rows_G, *, first: bool, mesh: Mesh | None
) -> _State:
    """Reads a piece of the prompts of the rows `rows_G`, padded on the right; None: of all rows."""
    model = nnx.merge(graphdef, params)
    cache = state.cache
    assert isinstance(cache, PagedCache)
    part = cache
    if rows_G is not None:
        part = dataclasses.replace(
            cache,
            table_BT=cache.table_BT.at[rows_G].get(mode="clip"),
            lengths_B=cache.lengths_B.at[rows_G].get(mode="clip"),
        )
    positions_GL = part.lengths_B[:, None] + jnp.arange(tokens_GL.shape[1], dtype=jnp.int32)
    with sharding.use_mesh(mesh):
        hidden_GLD, grown = model.decode(
            tokens_GL, part, positions_BL=positions_GL, segment_ids_BL=real_GL, empty=first
        )
    count_G = jnp.sum(real_GL, axis=1)
    last_G11 = jnp.maximum(count_G - 1, 0)[:, None, None]
    last_GD = jnp.take_along_axis(hidden_GLD, last_G11, axis=1)[:, 0]

    def put(old_B, new_G):
        # A row whose prompt has ended keeps what it has.
        if rows_G is None:
            return jnp.where(jnp.expand_dims(count_G > 0, range(1, old_B.ndim)), new_G, old_B)
        target_G = jnp.where(count_G > 0, rows_G, old_B.shape[0])
        return old_B.at[target_G].set(new_G, mode="drop")

    lengths_B = put(cache.lengths_B, grown.lengths_B)
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(grown, table_BT=cache.table_BT, lengths_B=lengths_B),
        hidden_BD=put(state.hidden_BD, last_GD),
        position_B=lengths_B,
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "first", "mesh"), donate_argnames="state")
def _prefill(
    graphdef, params, state: _State, tokens_BL, segments_BL, *, first: bool, mesh: Mesh | None
) -> _State:
    model = nnx.merge(graphdef, params)
    # Padding comes first in a row, so its positions, which nothing reads, may be anything.
    counted_BL = jnp.cumsum(segments_BL, axis=1)
    positions_BL = state.position_B[:, None] + jnp.maximum(counted_BL - 1, 0)
    with sharding.use_mesh(mesh):
        hidden_BLD, cache = model.decode(
            tokens_BL,
            state.cache,
            positions_BL=positions_BL,
            segment_ids_BL=segments_BL,
            empty=first,
        )
    return dataclasses.replace(
        state,
        cache=cache,
        hidden_BD=hidden_BLD[:, -1],
        position_B=state.position_B + counted_BL[:, -1],
    )


@functools.partial(
    jax.jit, static_argnames=("graphdef", "greedy", "filters", "mesh"), donate_argnames="state"
)
def _decode_round(
    graphdef,
    params,
    state: _State,
    seeds_B2,
    stops_P,
    steps,
    temperature,
    top_k,
    top_p,
    *,
    greedy: bool,
    filters: bool,
    mesh: Mesh | None,
) -> tuple[_State, jax.Array]:
    """Up to `steps` tokens a row, int32 [B, ROUND_STEPS]; ends early when all rows are done."""
    model = nnx.merge(graphdef, params)
    keys_B = jax.vmap(row_key)(seeds_B2)
    batch = state.done_B.shape[0]

    def unfinished(carry):
        state, _, done_steps = carry
        return (done_steps < steps) & ~jnp.all(state.done_B)

    def one(carry):
        state, tokens_BT, done_steps = carry
        logits_BV = model.logits(state.hidden_BD[:, None])[:, 0]
        token_B = sample(
            logits_BV,
            jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, state.step),
            greedy=greedy,
            filters=filters,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
        )
        tokens_BT = tokens_BT.at[:, done_steps].set(token_B)
        done_B = state.done_B | jnp.isin(token_B, stops_P)
        hidden_B1D, cache = model.decode(
            token_B[:, None],
            state.cache,
            positions_BL=state.position_B[:, None],
            segment_ids_BL=jnp.where(done_B, 0, 1)[:, None],
        )
        state = _State(cache, hidden_B1D[:, 0], state.position_B + 1, done_B, state.step + 1)
        return state, tokens_BT, done_steps + 1

    with sharding.use_mesh(mesh):
        tokens_BT = jnp.zeros((batch, ROUND_STEPS), jnp.int32)
        state, tokens_BT, _ = jax.lax.while_loop(
            unfinished, one, (state, tokens_BT, jnp.zeros((), jnp.int32))
        )
    if mesh is not None:
        tokens_BT = jax.lax.with_sharding_constraint(tokens_BT, sharding.replicated(mesh))
    return state, tokens_BT
