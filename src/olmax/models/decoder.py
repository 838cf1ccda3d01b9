"""The decoder: OLMo 2, OLMoE, Llama 2 and Llama 3.1 as configurations of one module."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.xla_cpu import apart
from olmax.errors import UserError
from olmax.models import parameters
from olmax.models.annotations import annotate
from olmax.models.attention import Attention
from olmax.models.config import DecoderConfig, Execution, RematPolicy
from olmax.models.kv_cache import KVCache, LayerCache
from olmax.models.mlp import MLP
from olmax.models.moe import MoE, RoutingRecord
from olmax.models.norm import RMSNorm
from olmax.models.paged_cache import PagedCache, PagedLayer
from olmax.models.rope import inverse_frequencies, rotation


class Block(nnx.Module):
    """One transformer layer, or all of them stacked on the leading `stack` dimensions."""

    def __init__(self, config: DecoderConfig, execution: Execution, *, stack=(), rngs: nnx.Rngs):
        self.config = config
        self.norm_position = config.norm_position
        norm: Any = dict(
            eps=config.norm_eps, stack=stack, param_dtype=execution.param_dtype, rngs=rngs
        )
        self.attention = Attention(config, execution, stack=stack, rngs=rngs)
        self.attention_norm = RMSNorm([(config.d_model, None)], **norm)
        if config.moe is None:
            self.mlp = MLP(config, execution, stack=stack, rngs=rngs)
        else:
            self.moe = MoE(config, execution, stack=stack, rngs=rngs)
        self.mlp_norm = RMSNorm([(config.d_model, None)], **norm)

    def __call__(
        self,
        x_BLD: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        segment_ids_BL: jax.Array | None = None,
        cache: LayerCache | PagedLayer | None = None,
        subsegment_ids_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | PagedLayer | None, RoutingRecord | None]:
        """Output [B, L, D]; the cache with the new tokens when there is one; what the router did
        when there is one.
        """
        attend = functools.partial(
            self.attention,
            rotation=rotation,
            segment_ids_BL=segment_ids_BL,
            cache=cache,
            subsegment_ids_BL=subsegment_ids_BL,
        )
        if self.norm_position == "output":
            y_BLD, cache = attend(x_BLD)
            x_BLD = x_BLD + self.attention_norm(y_BLD)
            x_BLD = annotate(x_BLD, ("batch", "length", None))
            y_BLD, routing = self._feed_forward(x_BLD, segment_ids_BL)
            x_BLD = x_BLD + self.mlp_norm(y_BLD)
        else:
            y_BLD, cache = attend(self.attention_norm(x_BLD))
            x_BLD = x_BLD + y_BLD
            x_BLD = annotate(x_BLD, ("batch", "length", None))
            y_BLD, routing = self._feed_forward(self.mlp_norm(x_BLD), segment_ids_BL)
            x_BLD = x_BLD + y_BLD
        return annotate(x_BLD, ("batch", "length", None)), cache, routing

    def _feed_forward(self, x_BLD, segment_ids_BL) -> tuple[jax.Array, RoutingRecord | None]:
        if self.config.moe is None:
            return self.mlp(x_BLD), None
        return self.moe(x_BLD, None if segment_ids_BL is None else segment_ids_BL != 0)


class Embedder(nnx.Module):
    """Token embedding; also the head of a model with tied embeddings."""

    def __init__(self, config: DecoderConfig, execution: Execution, *, rngs: nnx.Rngs):
        self.compute_dtype = jnp.dtype(execution.compute_dtype)
        self.embedding = parameters.param(
            rngs,
            parameters.truncated_normal(config.init_std),
            [(config.vocab_size, "vocab"), (config.d_model, "embed")],
            execution.param_dtype,
        )

    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        # Gathered along the width first: looking rows up in a matrix cut both ways would replicate
        # the result.
        embedding_VD = annotate(self.embedding[...], ("vocab", None))
        x_BLD = jnp.take(embedding_VD, tokens_BL, axis=0, mode="clip").astype(self.compute_dtype)
        return annotate(x_BLD, ("batch", "length", None))


class Head(nnx.Module):
    """Untied output projection to the vocabulary."""

    def __init__(self, config: DecoderConfig, execution: Execution, *, rngs: nnx.Rngs):
        self.kernel = parameters.param(
            rngs,
            parameters.truncated_normal(config.init_std),
            [(config.d_model, "embed"), (config.vocab_size, "vocab")],
            execution.param_dtype,
        )


class TrunkOutput(NamedTuple):
    """What the layers make of their inputs."""

    hidden_BLD: jax.Array
    """Normed final hidden states."""
    cache: KVCache | PagedCache | None
    """The grown cache, where one was given."""
    routing: RoutingRecord | None
    """What the routers did, layers stacked in front; None for a dense model."""


class Decoder(nnx.Module):
    """Decoder-only transformer.

    The pieces are public so that other models can be built around them: `embedder` maps tokens to
    inputs, `trunk` runs the layers on any input [B, L, D] (a vision-language model mixes image
    features in before it), `head_kernel` is the matrix the loss and the logits use.
    """

    def __init__(
        self, config: DecoderConfig, execution: Execution = Execution(), *, rngs: nnx.Rngs
    ):
        self.config = config
        self.execution = execution
        self.embedder = Embedder(config, execution, rngs=rngs)
        self.blocks = Block(config, execution, stack=[(config.n_layers, "layers")], rngs=rngs)
        self.final_norm = RMSNorm(
            [(config.d_model, None)],
            eps=config.norm_eps,
            param_dtype=execution.param_dtype,
            rngs=rngs,
        )
        if not config.tie_embeddings:
            self.head = Head(config, execution, rngs=rngs)

    def head_kernel(self) -> jax.Array:
        """Output matrix [D, V] in the parameter dtype."""
        return (
            self.embedder.embedding[...].T if self.config.tie_embeddings else self.head.kernel[...]
        )

    def hidden(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        subsegment_ids_BL: jax.Array | None = None,
    ) -> jax.Array:
        """Normed final hidden states [B, L, D] of `tokens_BL`, in the compute dtype. Arguments as
        in `__call__`.
        """
        return self.hidden_and_routing(
            tokens_BL,
            positions_BL=positions_BL,
            segment_ids_BL=segment_ids_BL,
            subsegment_ids_BL=subsegment_ids_BL,
        )[0]

    def hidden_and_routing(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        subsegment_ids_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, RoutingRecord | None]:
        """`hidden`, and what the routers of all layers did (None for a dense model)."""
        output = self.trunk(
            self.embedder(tokens_BL),
            positions_BL=positions_BL,
            segment_ids_BL=segment_ids_BL,
            subsegment_ids_BL=subsegment_ids_BL,
        )
        return output.hidden_BLD, output.routing

    def logits(self, hidden_BLD: jax.Array) -> jax.Array:
        """float32 logits [B, L, V] of hidden states."""
        kernel_DV = self.head_kernel().astype(hidden_BLD.dtype)
        logits_BLV = jnp.matmul(hidden_BLD, kernel_DV, preferred_element_type=jnp.float32)
        return annotate(logits_BLV, ("batch", "length", "vocab"))

    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        subsegment_ids_BL: jax.Array | None = None,
    ) -> jax.Array:
        """float32 logits [B, L, V].

        Args:
          tokens_BL: int32 token ids.
          positions_BL: int32 RoPE positions; 0, 1, ... when None.
          segment_ids_BL: int32; tokens attend only within equal, non-zero ids. None: plain causal
            attention over the whole row, documents included (OLMo 2's training).
          subsegment_ids_BL: int32; of the tokens before it, a token sees those whose id is at least
            its own. Branches behind a common prefix do not see each other if the prefix has the
            largest id and the branches' ids increase.
        """
        return self.logits(
            self.hidden(
                tokens_BL,
                positions_BL=positions_BL,
                segment_ids_BL=segment_ids_BL,
                subsegment_ids_BL=subsegment_ids_BL,
            )
        )

    def decode[Cache: KVCache | PagedCache](
        self,
        tokens_BL: jax.Array,
        cache: Cache,
        *,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        empty: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """Appends tokens to the cache and returns (hidden [B, L, D], the grown cache).

        `segment_ids_BL` is 1 for real tokens and 0 for padding, on the left of prompts for a
        `KVCache` and on the right for a `PagedCache`; `positions_BL` counts real tokens only. The
        caller keeps the tokens within the capacity. `empty` says that the cache is, so that a
        prompt attends to itself alone, in blocks.
        """
        if self.config.moe is not None and self.config.moe.routing == "expert_choice":
            raise UserError(
                "this model's experts choose among all tokens of a sequence (expert_choice), later "
                "ones included, so it cannot generate"
            )
        output = self.trunk(
            self.embedder(tokens_BL),
            positions_BL=positions_BL,
            segment_ids_BL=segment_ids_BL,
            cache=cache.marked(segment_ids_BL),
            cache_is_empty=empty,
        )
        return output.hidden_BLD, cast(Cache, output.cache)

    def layer_outputs(self, x_BLD: jax.Array, offsets_NBLD: jax.Array | None = None) -> jax.Array:
        """Hidden states [N, B, L, D] after every layer, for studies of the network itself.

        Args:
          x_BLD: inputs, such as `embedder(tokens_BL)`.
          offsets_NBLD: added to every layer's output; the gradient with respect to zeros here is
            the gradient with respect to the hidden states.
        """
        batch, length, _ = x_BLD.shape
        positions_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        inv_freq = inverse_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        # Once for all layers: their fusions would each compute the sines again.
        cos_sin = apart(rotation(positions_BL, inv_freq))
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x_BLD, scanned):
            params, offset_BLD = scanned
            x_BLD, _, _ = nnx.merge(graphdef, params)(x_BLD, cos_sin)
            if offset_BLD is not None:
                x_BLD = x_BLD + offset_BLD
            return x_BLD, x_BLD

        return jax.lax.scan(layer, x_BLD, (stacked, offsets_NBLD))[1]

    def trunk(
        self,
        x_BLD: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        cache: KVCache | PagedCache | None = None,
        cache_is_empty: bool = False,
        subsegment_ids_BL: jax.Array | None = None,
    ) -> TrunkOutput:
        """All layers and the final norm on inputs [B, L, D]. No subsegments with a cache."""
        batch, length, _ = x_BLD.shape
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        inv_freq = inverse_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        # Once for all layers: their fusions would each compute the sines again.
        cos_sin = apart(rotation(positions_BL, inv_freq))
        graphdef, stacked = nnx.split(self.blocks)

        def layer(carry, scanned):
            x_BLD, stored = carry
            params, number = scanned
            layer_cache = None
            if cache is not None:
                layer_cache = cache.layer(stored, number, segment_ids_BL, empty=cache_is_empty)
            x_BLD, layer_cache, routing = nnx.merge(graphdef, params)(
                x_BLD, cos_sin, segment_ids_BL, layer_cache, subsegment_ids_BL
            )
            return (x_BLD, None if layer_cache is None else layer_cache.stored), routing

        layer = rematerialise(layer, self.execution.remat)
        n_layers = self.config.n_layers
        unroll = n_layers if self.execution.unroll_layers else 1
        # The cache is carried, not scanned: a scan would write all of it anew.
        stored = None if cache is None else cache.stored
        numbers = jnp.arange(n_layers, dtype=jnp.int32)
        (x_BLD, stored), routing = jax.lax.scan(
            layer, (x_BLD, stored), (stacked, numbers), unroll=unroll
        )
        if cache is not None:
            assert segment_ids_BL is not None
            cache = cache.grown(stored, segment_ids_BL)
        return TrunkOutput(self.final_norm(x_BLD), cache, routing)


def rematerialise(fn, policy: RematPolicy):
    """`fn` under the named rematerialisation policy (see `Execution.remat`)."""
    if policy == "none":
        return fn
    policies = {
        "full": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "projections": jax.checkpoint_policies.save_only_these_names("qkv", "attention_output"),
    }
    # Inside a scan the compiler cannot merge the recomputation away, so the costly CSE barrier is
    # not needed.
    return jax.checkpoint(fn, policy=policies[policy], prevent_cse=False)
