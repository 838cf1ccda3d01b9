"""Running a model over text and keeping which experts each token goes to."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from olmax import sharding
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.generation.batching import mesh_of
from olmax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Routes:
    """Experts of every token of a corpus."""

    n_experts: int
    domains: tuple[str, ...]
    tokens_T: np.ndarray
    """int32: ids read, windows one after the other."""
    next_T: np.ndarray
    """int32: id that follows in the window; -1 at its end."""
    predicted_T: np.ndarray
    """int32: most likely next id."""
    domain_T: np.ndarray
    """int32: index into `domains`."""
    experts_NTk: np.ndarray
    """int16: experts of each token in each layer, the most likely first."""

    def of(self, layer: int, domain: str | None = None) -> np.ndarray:
        """Experts [T, k] of one layer, of all tokens or of a domain's."""
        experts_Tk = self.experts_NTk[layer]
        if domain is None:
            return experts_Tk
        return experts_Tk[self.domain_T == self.domains.index(domain)]


def windows(
    tokenizer: Tokenizer,
    documents: Mapping[str, Sequence[str]],
    *,
    length: int,
    tokens: int | None = None,
) -> dict[str, np.ndarray]:
    """Each domain's documents tokenised, concatenated and cut into windows, int32 [W, length].

    As in the paper nothing stands between documents, and an incomplete last window is left out.

    Args:
      tokenizer: of the model.
      documents: texts by domain.
      length: of a window (the paper: 2048).
      tokens: stop a domain once it has more than this many (the paper: 204,800).

    Raises:
      UserError: a domain does not fill one window.
    """
    found = {}
    for domain, texts in documents.items():
        ids = np.asarray([i for row in tokenizer.encode_batch(list(texts)) for i in row], np.int32)
        count = len(ids) // length
        if tokens is not None:
            count = min(count, tokens // length + 1)
        if not count:
            raise UserError(
                f"routing: {domain} has {len(ids)} tokens, fewer than one window of {length}; "
                "give more text or a shorter --window"
            )
        found[domain] = ids[: count * length].reshape(count, length)
    return found


def collect(
    model: Decoder,
    corpus: Mapping[str, np.ndarray],
    *,
    batch_tokens: int = 16384,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Routes:
    """Runs `model` over the windows of every domain (see `windows`).

    Raises:
      UserError: the model has no experts, or experts that choose their tokens.
    """
    moe = model.config.moe
    if moe is None:
        raise UserError("routing: this model is dense; it has no experts to analyse")
    if moe.routing != "token_choice":
        raise UserError("routing: this model's experts choose tokens (expert_choice)")
    mesh = mesh_of(model) if mesh is None else mesh
    tokens_WL = np.concatenate(list(corpus.values()))
    domain_W = np.repeat(np.arange(len(corpus)), [len(rows) for rows in corpus.values()])
    count, length = tokens_WL.shape
    pieces = 1 if mesh is None else sharding.batch_shards(mesh)
    batch = max(1, min(batch_tokens // length, -(-count // pieces) * pieces) // pieces) * pieces
    graphdef, state = nnx.split(model)
    experts, predicted = [], []
    for start in tqdm(range(0, count, batch), desc="routing", disable=not progress, leave=False):
        rows_BL = tokens_WL[start : start + batch]
        # One shape for all batches, so that there is one program.
        padded_BL = np.pad(rows_BL, ((0, batch - len(rows_BL)), (0, 0)))
        found = _route(graphdef, state, jnp.asarray(padded_BL), mesh=mesh)
        experts_NBLk, predicted_BL = jax.device_get(found)
        experts.append(experts_NBLk[:, : len(rows_BL)].astype(np.int16))
        predicted.append(predicted_BL[: len(rows_BL)])
    experts_NWLk = np.concatenate(experts, axis=1)
    next_WL = np.concatenate([tokens_WL[:, 1:], np.full((count, 1), -1, np.int32)], axis=1)
    return Routes(
        n_experts=moe.n_experts,
        domains=tuple(corpus),
        tokens_T=tokens_WL.reshape(-1),
        next_T=next_WL.reshape(-1),
        predicted_T=np.concatenate(predicted).reshape(-1),
        domain_T=np.repeat(domain_W, length),
        experts_NTk=experts_NWLk.reshape(len(experts_NWLk), count * length, -1),
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _route(graphdef, state, tokens_BL, *, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """Experts int32 [N, B, L, k] and the most likely next id int32 [B, L]."""
    model = nnx.merge(graphdef, state)
    with sharding.use_mesh(mesh):
        hidden_BLD, routing = model.hidden_and_routing(tokens_BL)
        predicted_BL = jnp.argmax(model.logits(hidden_BLD), axis=-1).astype(jnp.int32)
    found = routing.experts_BLk, predicted_BL
    if mesh is not None:
        found = jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))
    return found
