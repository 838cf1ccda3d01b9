"""Named architectures. Sizes: specs/olmo2.md section 1, OLMo-core's config.py, the Llama 2 and 3.1
reports, and specs/olmoe.md sections 1 and 3.
"""

import difflib
from collections.abc import Callable
from typing import Any

from olmax.errors import UserError
from olmax.models.config import DecoderConfig, Llama3RopeScaling, MoEConfig


def _olmo2(
    d_model, n_layers, n_heads, d_ff, n_kv_heads=None, head_dim=None, **kwargs
) -> DecoderConfig:
    return DecoderConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_dim=head_dim or d_model // n_heads,
        d_ff=d_ff,
        **kwargs,
    )


def _llama(d_model, n_layers, n_heads, n_kv_heads, d_ff, **kwargs) -> DecoderConfig:
    return DecoderConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        d_ff=d_ff,
        norm_position="input",
        qk_norm="none",
        norm_eps=1e-5,
        **kwargs,
    )


def _llama2(*shape) -> DecoderConfig:
    return _llama(*shape, vocab_size=32000, rope_theta=10_000.0, max_seq_len=4096)


def _llama31(*shape) -> DecoderConfig:
    return _llama(*shape, vocab_size=128256, max_seq_len=131072, rope_scaling=Llama3RopeScaling())


def _mixtral() -> DecoderConfig:
    """arXiv 2401.04088, table 1; the weights of the two experts of a token add up to one."""
    return _llama(
        *(4096, 32, 32, 8, 14336),
        vocab_size=32000,
        rope_theta=1e6,
        max_seq_len=32768,
        moe=MoEConfig(8, 2, normalize_weights=True),
    )


def _olmoe(shape, moe: MoEConfig | None, **kwargs) -> DecoderConfig:
    d_model, n_layers, n_heads, d_ff = shape
    settings: dict[str, Any] = dict(vocab_size=50304, max_seq_len=4096)
    return DecoderConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=d_ff,
        norm_position="input",
        norm_eps=1e-5,
        rope_theta=10_000.0,
        moe=moe,
        **settings | kwargs,
    )


def _ablation(d_ff: int, moe: MoEConfig | None) -> DecoderConfig:
    """Shapes of the paper's ablations, which had no QK-norm; all have 8192 active widths."""
    return _olmoe((2048, 16, 16, d_ff), moe, qk_norm="none")


def _olmoe_tiny(d_ff: int, moe: MoEConfig | None) -> DecoderConfig:
    return _olmoe((128, 4, 4, d_ff), moe, vocab_size=1024, max_seq_len=256)


PRESETS: dict[str, Callable[[], DecoderConfig]] = {
    # d_model, layers, heads, feed-forward
    "olmo2-190m": lambda: _olmo2(768, 12, 12, 3072),
    "olmo2-370m": lambda: _olmo2(1024, 16, 16, 4096),
    "olmo2-600m": lambda: _olmo2(1344, 16, 16, 5376),
    "olmo2-760m": lambda: _olmo2(1536, 16, 16, 6144),
    "olmo2-1b": lambda: _olmo2(2048, 16, 16, 8192),
    "olmo2-7b": lambda: _olmo2(4096, 32, 32, 11008),
    "olmo2-13b": lambda: _olmo2(5120, 40, 40, 13824),
    "olmo2-32b": lambda: _olmo2(5120, 64, 40, 27648, n_kv_heads=8),
    # d_model, layers, heads, key/value heads, feed-forward
    "llama2-7b": lambda: _llama2(4096, 32, 32, 32, 11008),
    "llama2-70b": lambda: _llama2(8192, 80, 64, 8, 28672),
    "llama3.1-8b": lambda: _llama31(4096, 32, 32, 8, 14336),
    "llama3.1-70b": lambda: _llama31(8192, 80, 64, 8, 28672),
    "llama3.1-405b": lambda: _llama31(16384, 126, 128, 8, 53248),
    # Beside the models above in published speeds, which plans are compared with.
    "mixtral-8x7b": _mixtral,
    # experts, experts of a token
    "olmoe-1b-7b": lambda: _olmoe((2048, 16, 16, 1024), MoEConfig(64, 8)),
    "olmoe-ablation-dense": lambda: _ablation(8192, None),
    "olmoe-ablation-8e": lambda: _ablation(8192, MoEConfig(8, 1)),
    "olmoe-ablation-32e": lambda: _ablation(2048, MoEConfig(32, 4)),
    "olmoe-ablation-64e": lambda: _ablation(1024, MoEConfig(64, 8)),
    "olmoe-ablation-128e": lambda: _ablation(512, MoEConfig(128, 16)),
    "olmoe-ablation-shared": lambda: _ablation(2048, MoEConfig(31, 3, shared_d_ff=2048)),
    "olmoe-ablation-expert-choice": lambda: _ablation(
        8192, MoEConfig(8, 1, routing="expert_choice")
    ),
    # Small enough for tests and laptops; the vocabulary is that of a tokenizer trained on the spot.
    "olmo2-tiny": lambda: _olmo2(128, 4, 4, 512, vocab_size=1024, max_seq_len=256),
    "olmo2-tiny-gqa": lambda: _olmo2(
        128, 4, 4, 512, n_kv_heads=2, vocab_size=1024, max_seq_len=256
    ),
    "llama3.1-tiny": lambda: _llama(
        128,
        4,
        4,
        2,
        384,
        vocab_size=1024,
        max_seq_len=256,
        rope_scaling=Llama3RopeScaling(original_max_position_embeddings=64),
        tie_embeddings=True,
    ),
    # Four of sixteen experts are as wide together as the dense one.
    "olmoe-tiny": lambda: _olmoe_tiny(128, MoEConfig(16, 4)),
    "olmoe-tiny-dense": lambda: _olmoe_tiny(512, None),
    "olmoe-tiny-8e": lambda: _olmoe_tiny(256, MoEConfig(8, 2)),
    "olmoe-tiny-4e": lambda: _olmoe_tiny(512, MoEConfig(4, 1)),
    "olmoe-tiny-shared": lambda: _olmoe_tiny(128, MoEConfig(15, 3, shared_d_ff=128)),
    "olmoe-tiny-expert-choice": lambda: _olmoe_tiny(128, MoEConfig(16, 4, routing="expert_choice")),
}


def get_preset(name: str) -> DecoderConfig:
    """The architecture called `name`.

    Raises:
      UserError: no such preset; the message names near ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or list(PRESETS)
        raise UserError(f"unknown model preset {name!r}; did you mean {', '.join(near)}?")
    return PRESETS[name]()
