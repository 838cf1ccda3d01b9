"""What a decoder is (`DecoderConfig`) and how it is run (`Execution`).

Counts come from the config alone; nothing here builds a model or imports jax.
"""

import dataclasses
from typing import Literal

from olmax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency-dependent RoPE scaling (config key `rope_type: "llama3"`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Experts in place of every layer's feed-forward block (OLMoE; specs/olmoe.md section 1).

    `DecoderConfig.d_ff` is then the width of one expert. Nothing is ever dropped: an expert takes
    as many tokens as choose it.
    """

    n_experts: int
    experts_per_token: int
    """Experts that a token is sent to (k). Under `expert_choice` the average."""
    normalize_weights: bool = False
    """Whether a token's k weights are divided by their sum. OLMoE leaves the probabilities of the
    softmax over all experts as they are."""
    shared_d_ff: int = 0
    """Width of a further expert that every token passes through; 0: there is none."""
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    """`token_choice`: every token takes its k most likely experts. `expert_choice`: every expert
    takes its L * k / n_experts most likely tokens of each sequence of L, so later tokens decide on
    earlier ones: an ablation that cannot generate."""

    def __post_init__(self):
        for name in ("n_experts", "experts_per_token"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"model config: moe.{name} must be at least 1, is {getattr(self, name)}"
                )
        if self.experts_per_token > self.n_experts:
            raise UserError(
                f"model config: moe.experts_per_token={self.experts_per_token} is more than "
                f"moe.n_experts={self.n_experts}"
            )
        if self.shared_d_ff < 0:
            raise UserError(
                f"model config: moe.shared_d_ff must not be negative, is {self.shared_d_ff}"
            )


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder-only transformer: everything that determines its function.

    The defaults are OLMo 2's (specs/olmo2.md section 1); Llama 3.1 differs in `norm_position`,
    `qk_norm`, `norm_eps`, grouped heads, `rope_scaling` and the tied or untied head; OLMoE in
    `moe`, `norm_position`, `norm_eps` and `rope_theta`.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    """Width of the feed-forward block, or of one expert."""
    vocab_size: int = 100352
    """Rows of the embedding, padding rows included."""
    max_seq_len: int = 4096
    norm_position: Literal["output", "input"] = "output"
    """`output`: x + norm(f(x)), OLMo 2's reordered norm. `input`: x + f(norm(x)), pre-norm."""
    qk_norm: Literal["full", "none"] = "full"
    """`full`: RMSNorm over the whole projected query (key) vector, before the split into heads."""
    norm_eps: float = 1e-6
    rope_theta: float = 500_000.0
    rope_scaling: Llama3RopeScaling | None = None
    tie_embeddings: bool = False
    init: Literal["normal", "scaled"] = "normal"
    """`normal`: OLMo 2's truncated normal, std `init_std`, cut at 3 std. `scaled`: OLMo-0424's
    fan-in init, depth-scaled outputs; kept as the comparison of the stability study (paper section
    3.2)."""
    init_std: float = 0.02
    moe: MoEConfig | None = None
    """Experts in every layer; None: a dense model."""

    def __post_init__(self):
        for name in (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "vocab_size",
            "max_seq_len",
        ):
            if getattr(self, name) < 1:
                raise UserError(
                    f"model config: {name} must be at least 1, is {getattr(self, name)}"
                )
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model config: n_heads={self.n_heads} is not a multiple of n_kv_heads="
                f"{self.n_kv_heads}; every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"model config: head_dim={self.head_dim} must be even (RoPE rotates pairs)"
            )
        if self.moe is not None and self.init != "normal":
            raise UserError(f"model config: init={self.init!r} has no meaning for experts")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head (G)."""
        return self.n_heads // self.n_kv_heads

    @property
    def num_embedding_params(self) -> int:
        """Parameters of the input embedding matrix."""
        return self.vocab_size * self.d_model

    @property
    def num_params(self) -> int:
        """All parameters. A tied head is not counted twice."""
        return self._count(1 if self.moe is None else self.moe.n_experts)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token meets: of the experts only those it is sent to. Both embedding
        matrices count; of a dense model all parameters do.

        OLMoE's published count, 1,281,951,744 of 6,919,161,856, leaves out the scales of the
        QK-norm (2 * width a layer), and so does this one for models with experts.
        """
        if self.moe is None:
            return self.num_params
        return self._count(self.moe.experts_per_token) - self.n_layers * self._qk_norm_scales

    @property
    def num_active_non_embedding_params(self) -> int:
        """`num_active_params` without the input embedding (a tied one counts, as the head)."""
        return self.num_active_params - (0 if self.tie_embeddings else self.num_embedding_params)

    @property
    def active_d_ff(self) -> int:
        """Feed-forward width that one token passes through."""
        if self.moe is None:
            return self.d_ff
        return self.d_ff * self.moe.experts_per_token + self.moe.shared_d_ff

    @property
    def _qk_norm_scales(self) -> int:
        """Parameters of one layer's QK-norm."""
        return (self.n_heads + self.n_kv_heads) * self.head_dim if self.qk_norm == "full" else 0

    def _count(self, experts: int) -> int:
        """Parameters with `experts` feed-forward blocks a layer."""
        d, h = self.d_model, self.head_dim
        attention = d * h * (self.n_heads + 2 * self.n_kv_heads) + self.n_heads * h * d
        layer = attention + self._qk_norm_scales + 3 * d * self.d_ff * experts + 2 * d
        if self.moe is not None:
            layer += d * self.moe.n_experts + 3 * d * self.moe.shared_d_ff
        head = 0 if self.tie_embeddings else self.vocab_size * d
        return self.num_embedding_params + self.n_layers * layer + d + head

    @property
    def num_non_embedding_params(self) -> int:
        """Parameters without the input embedding (the head counts: it multiplies every token)."""
        if self.tie_embeddings:
            return self.num_params
        return self.num_params - self.num_embedding_params

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Training FLOPs per token as the OLMo 2 and ladder papers count them (specs/ladder.md
        section 1).

        Forward 2N + 4 * layers * width * seq_len, backward 4(N + V * d_model) + twice the attention
        term, N without the input embedding. The backward term counts the input embedding although
        no matrix product touches it; use `matmul_flops_per_token` for utilisation. Of experts only
        the active ones count.
        """
        seq_len = self.max_seq_len if seq_len is None else seq_len
        attention = self.n_layers * self.n_heads * self.head_dim * seq_len
        n = self.num_active_non_embedding_params
        embedding = 0 if self.tie_embeddings else self.num_embedding_params
        return (2 * n + 4 * attention) + (4 * (n + embedding) + 8 * attention)

    def matmul_flops_per_token(self, seq_len: int | None = None, *, causal: bool = True) -> int:
        """FLOPs per token of the matrix products of a training step, for model FLOPs utilisation.

        6 per (active) parameter that multiplies a token, plus the attention scores and their
        weighted sum, 12 * layers * width * seq_len, halved for causal attention (MaxText's
        convention since 2025).
        """
        seq_len = self.max_seq_len if seq_len is None else seq_len
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return 6 * self.num_active_non_embedding_params + (attention // 2 if causal else attention)


RematPolicy = Literal["none", "full", "dots", "projections"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is run. None of these fields changes the function beyond rounding."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of matrix products and activations. Norm statistics, RoPE, softmax and the loss are
    always float32.
    """
    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype parameters are created in; training keeps the float32 master."""
    remat: RematPolicy = "none"
    """What the backward pass recomputes. `none` saves everything; `full` saves each layer's input
    only; `dots` saves the outputs of weight matrix products; `projections` saves the fused qkv, the
    attention output and the block inputs."""
    unroll_layers: bool = False
    """Unroll the scan over layers: longer compilation, faster on CPUs."""
    attention: str | None = None
    """Implementation of `kernels_pallas.attention`; None picks the best one for the device."""
    experts: str | None = None
    """Implementation of `kernels_pallas.grouped_matmul`; None picks the best one for the device."""
    router: str | None = None
    """Implementation of `kernels_pallas.router`; None picks the best one for the device."""
    loss: str | None = None
    """Implementation of `kernels_pallas.linear_cross_entropy`; None picks the best one for the
    device.
    """
