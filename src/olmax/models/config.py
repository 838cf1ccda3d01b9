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
class DecoderConfig:
    """Architecture of a dense decoder-only transformer: everything that determines its function.

    The defaults are OLMo 2's (specs/olmo2.md section 1); Llama 3.1 differs in `norm_position`,
    `qk_norm`, `norm_eps`, grouped heads, `rope_scaling` and the tied or untied head.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
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
        d, h = self.d_model, self.head_dim
        attention = d * h * (self.n_heads + 2 * self.n_kv_heads) + self.n_heads * h * d
        if self.qk_norm == "full":
            attention += (self.n_heads + self.n_kv_heads) * h
        layer = attention + 3 * d * self.d_ff + 2 * d
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
        no matrix product touches it; use `matmul_flops_per_token` for utilisation.
        """
        seq_len = self.max_seq_len if seq_len is None else seq_len
        attention = self.n_layers * self.n_heads * self.head_dim * seq_len
        n = self.num_non_embedding_params
        embedding = 0 if self.tie_embeddings else self.num_embedding_params
        return (2 * n + 4 * attention) + (4 * (n + embedding) + 8 * attention)

    def matmul_flops_per_token(self, seq_len: int | None = None, *, causal: bool = True) -> int:
        """FLOPs per token of the matrix products of a training step, for model FLOPs utilisation.

        6 per parameter that multiplies every token, plus the attention scores and their weighted
        sum, 12 * layers * width * seq_len, halved for causal attention (MaxText's convention since
        2025).
        """
        seq_len = self.max_seq_len if seq_len is None else seq_len
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return 6 * self.num_non_embedding_params + (attention // 2 if causal else attention)


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
    loss: str | None = None
    """Implementation of `kernels_pallas.linear_cross_entropy`; None picks the best one for the
    device.
    """
