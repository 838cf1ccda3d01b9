"""From logits to the next token."""

import dataclasses

import jax
import jax.numpy as jnp

from olmax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The order is that of transformers: temperature, then the `top_k` most likely tokens, then the
    fewest of those whose probability reaches `top_p`.
    """

    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """1 keeps all tokens."""
    top_k: int = 0
    """0 keeps all tokens."""

    def __post_init__(self):
        if not self.temperature >= 0:
            raise UserError(f"temperature {self.temperature} must be at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1 (1 keeps all)")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be at least 0 (0 keeps all)")

    @property
    def greedy(self) -> bool:
        """Whether no random number is drawn."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether some tokens are left out, which takes a sort of the vocabulary."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)


def row_key(seed_2: jax.Array) -> jax.Array:
    """The key of a row from its (seed, number), uint32 [2]: a row's samples depend on these two
    alone, not on the rows beside it.
    """
    return jax.random.fold_in(jax.random.key(seed_2[0]), seed_2[1])


def keep_likely(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """`logits_BV`, sorted from high to low, with -inf for those that `top_k` (0: none) and `top_p`
    leave out. The first always stays.
    """
    rank_V = jnp.arange(logits_BV.shape[-1])
    logits_BV = jnp.where((top_k == 0) | (rank_V < top_k), logits_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(logits_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    return jnp.where((before_BV < top_p) | (rank_V == 0), logits_BV, -jnp.inf)


def sample(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    *,
    greedy: bool,
    filters: bool,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """One token int32 [B] a row of float32 logits; see `Sampling` for the arguments."""
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / temperature
    categorical = jax.vmap(jax.random.categorical)
    if not filters:
        return categorical(keys_B, logits_BV).astype(jnp.int32)
    sorted_BV, token_BV = jax.lax.top_k(logits_BV, logits_BV.shape[-1])
    rank_B = categorical(keys_B, keep_likely(sorted_BV, top_k, top_p))
    return jnp.take_along_axis(token_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)
