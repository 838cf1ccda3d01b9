"""Hugging Face `config.json` <-> `DecoderConfig`, for model types olmo2, olmoe and llama.

Absent keys take the defaults of the transformers classes (read from transformers 5.23), which
differ from the released values (specs/olmo2.md section 8). RoPE is read from `rope_theta` +
`rope_scaling` (transformers 4) and from `rope_parameters` (transformers 5), and written as both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from olmax.errors import UserError
from olmax.interop.keys import Keys
from olmax.models.config import DecoderConfig, Llama3RopeScaling, MoEConfig

_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "olmo2": dict(vocab_size=50304, rms_norm_eps=1e-5),
    "llama": dict(vocab_size=32000, rms_norm_eps=1e-6),
    "olmoe": dict(
        vocab_size=50304,
        rms_norm_eps=1e-5,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
    ),
}
_ARCHITECTURES = {
    "olmo2": "Olmo2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}
_ALL_DEFAULTS = dict(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
)

# Keys of the transformers base class, of generation and of tools that leave the logits alone.
# `pretraining_tp` only cut matrix products into slices and summed them again; current transformers
# ignores it.
_HARMLESS = (
    "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
    "id2label", "initializer_range", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
    "attn_implementation", "_flash_attn_2_enabled", "_attn_implementation",
    "_attn_implementation_autoset", "is_decoder", "sep_token_id", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "num_return_sequences",
    "diversity_penalty", "encoder_no_repeat_ngram_size", "num_beam_groups", "typical_p",
    "early_stopping", "model_max_length",
)  # fmt: skip

# What a key that nobody knows must not contain: these words name changes of the function in related
# model types.
_SUSPICIOUS = (
    "attention", "attn", "bias", "norm", "rope", "rotary", "position", "window", "softcap",
    "scal", "multiplier", "logit", "expert", "moe", "quant", "clip", "layer", "head",
    "activation", "act_fn", "hidden", "embedding", "residual", "alibi", "lora", "adapter",
    "sink", "gate", "auto_map", "prun", "cross",
)  # fmt: skip


def from_huggingface(values: Mapping[str, Any], file: str = "config.json") -> DecoderConfig:
    """The architecture that a Hugging Face `config.json` describes.

    A key that changes the computation and is not supported is an error. A key that neither
    transformers' class nor this reader knows is ignored with a logged warning, because transformers
    itself would not act on it, unless its name says that it might matter.

    Raises:
      UserError: naming key, value and `file`.
    """
    keys = Keys(values, file)
    model_type = values.get("model_type")
    if model_type not in _CLASS_DEFAULTS:
        raise keys.error("model_type", f"is not supported (only {' or '.join(_CLASS_DEFAULTS)})")
    defaults = _ALL_DEFAULTS | _CLASS_DEFAULTS[model_type]
    keys.require("hidden_act", "silu", "swish", default="silu")
    keys.require("attention_bias", False, default=False)
    keys.require("mlp_bias", False, default=False)
    # Attention dropout is no part of inference, but training would silently go on without it.
    keys.require("attention_dropout", 0, default=0)
    keys.require("quantization_config", None)
    keys.require("sliding_window", None)
    keys.require("is_encoder_decoder", False, default=False)
    for index, layer_type in enumerate(keys.get("layer_types", ())):
        if layer_type != "full_attention":
            raise keys.error("layer_types", f"is not supported: layer {index} is {layer_type!r}")

    d_model = keys.integer("hidden_size", defaults["hidden_size"])
    n_heads = keys.integer("num_attention_heads", defaults["num_attention_heads"])
    head_dim = keys.get("head_dim")
    if head_dim is None and d_model % n_heads:
        raise keys.error(
            "num_attention_heads",
            f"does not divide hidden_size {d_model}, and there is no head_dim",
        )
    max_seq_len = keys.integer("max_position_embeddings", defaults["max_position_embeddings"])
    theta, scaling = _rope(keys, max_seq_len)
    output_norm = model_type == "olmo2"
    moe = _experts(keys) if model_type == "olmoe" else None
    config = DecoderConfig(
        d_model=d_model,
        n_layers=keys.integer("num_hidden_layers", defaults["num_hidden_layers"]),
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads", n_heads),
        head_dim=keys.integer("head_dim", d_model // n_heads),
        d_ff=keys.integer("intermediate_size", defaults["intermediate_size"]),
        vocab_size=keys.integer("vocab_size", defaults["vocab_size"]),
        max_seq_len=max_seq_len,
        norm_position="output" if output_norm else "input",
        qk_norm="none" if model_type == "llama" else "full",
        norm_eps=keys.number("rms_norm_eps", defaults["rms_norm_eps"]),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        moe=moe,
    )
    keys.skip(*_HARMLESS)
    keys.warn_unread(_SUSPICIOUS)
    return config


def _experts(keys: Keys) -> MoEConfig:
    """The experts of an olmoe; `num_local_experts` is transformers' other name of `num_experts`."""
    keys.require("clip_qkv", None)
    # They belong to transformers' own auxiliary loss, which is not the one OLMoE was trained with.
    keys.skip("output_router_logits", "router_aux_loss_coef")
    experts = keys.integer("num_experts", keys.integer("num_local_experts", 64))
    if keys.integer("num_local_experts", experts) != experts:
        raise keys.error("num_local_experts", f"contradicts num_experts = {experts}")
    chosen = keys.integer("num_experts_per_tok", 8)
    if chosen > experts:
        raise keys.error("num_experts_per_tok", f"is more than num_experts = {experts}")
    return MoEConfig(experts, chosen, normalize_weights=keys.flag("norm_topk_prob", False))


def _rope(keys: Keys, max_seq_len: int) -> tuple[float, Llama3RopeScaling | None]:
    """RoPE base and scaling from the old keys, the new key, or both where they agree."""
    keys.require("partial_rotary_factor", 1, default=1)
    candidates = []
    for key in ("rope_scaling", "rope_parameters"):
        if keys.get(key):
            rope = keys.child(key)
            candidates.append((key, _theta(keys, rope), _scaling(keys, rope, max_seq_len)))
    if not candidates:
        return keys.number("rope_theta", 10_000.0), None
    if candidates[0][1:] != candidates[-1][1:]:
        raise keys.error(
            "rope_parameters",
            f"contradicts rope_scaling = {keys.get('rope_scaling')!r}; remove one of them",
        )
    return candidates[0][1:]


def _theta(keys: Keys, rope: Keys) -> float:
    if rope.get("rope_theta") is None:
        return keys.number("rope_theta", 10_000.0)
    theta = rope.number("rope_theta")
    if keys.get("rope_theta") is not None and keys.number("rope_theta") != theta:
        raise keys.error(
            "rope_theta", f"contradicts {rope.prefix}rope_theta = {theta!r}; remove one of them"
        )
    return theta


def _scaling(keys: Keys, rope: Keys, max_seq_len: int) -> Llama3RopeScaling | None:
    rope.require("partial_rotary_factor", 1, default=1)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    rope.skip("rope_type", "type", "original_max_position_embeddings")
    if rope_type == "default":
        rope.refuse_unread()
        return None
    if rope_type != "llama3":
        raise rope.error(
            "rope_type" if "rope_type" in rope.values else "type",
            "is not supported (only default or llama3)",
        )
    original = rope.get("original_max_position_embeddings", max_seq_len)
    outer = keys.get("original_max_position_embeddings", original)
    if outer != original:
        raise keys.error(
            "original_max_position_embeddings",
            f"contradicts {rope.prefix}original_max_position_embeddings",
        )
    scaling = Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", original),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.error("high_freq_factor", "must be greater than low_freq_factor")
    rope.refuse_unread()
    return scaling


def model_type(config: DecoderConfig) -> str:
    """The Hugging Face model type that computes `config`.

    Raises:
      UserError: none does.
    """
    moe = config.moe
    if moe is not None and (moe.shared_d_ff or moe.routing != "token_choice"):
        raise UserError(
            "no Hugging Face model type that is written here has "
            + ("expert choice" if moe.routing != "token_choice" else "OLMoE with a shared expert")
            + "; write --format orbax"
        )
    kinds = {
        ("output", "full", False): "olmo2",
        ("input", "none", False): "llama",
        ("input", "full", True): "olmoe",
    }
    kind = kinds.get((config.norm_position, config.qk_norm, moe is not None))
    if kind is None:
        raise UserError(
            "no Hugging Face model type that is written here has "
            f"norm_position={config.norm_position!r}, qk_norm={config.qk_norm!r} and "
            f"{'experts' if moe else 'no experts'}; olmo2 has output and full, llama input and "
            "none, olmoe input, full and experts"
        )
    if kind == "olmoe" and config.head_dim * config.n_heads != config.d_model:
        raise UserError(
            f"Hugging Face's olmoe has no head_dim of its own: d_model={config.d_model} must be "
            f"n_heads={config.n_heads} x head_dim={config.head_dim}"
        )
    if kind == "olmoe" and config.rope_scaling is not None:
        raise UserError("rope_scaling of an olmoe is not exported; write --format orbax")
    return kind


def to_huggingface(
    config: DecoderConfig,
    *,
    dtype: str = "float32",
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The `config.json` of `config`, readable by transformers 4 (old RoPE and dtype keys) and 5
    (new ones).
    """
    kind = model_type(config)
    scaling = (
        None
        if config.rope_scaling is None
        else {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    )
    values = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": config.rope_theta,
            **(scaling or {"rope_type": "default"}),
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if kind == "llama":
        values["mlp_bias"] = False
    if config.moe is not None:
        del values["head_dim"]
        values |= {
            "clip_qkv": None,
            "num_experts": config.moe.n_experts,
            "num_experts_per_tok": config.moe.experts_per_token,
            "norm_topk_prob": config.moe.normalize_weights,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.01,
        }
    return values
