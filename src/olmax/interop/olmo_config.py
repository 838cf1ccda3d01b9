"""Configurations of the older OLMo code bases -> `DecoderConfig`.

The old trainer (github.com/allenai/OLMo) writes `config.yaml`; OLMo-core writes `config.json` with
a nested model. Both are read strictly: a key that is not known here is an error. Facts:
specs/olmo2.md section 8 and the two code bases.
"""

from collections.abc import Mapping
from typing import Any

from olmax.errors import UserError
from olmax.interop.keys import Keys
from olmax.models.config import DecoderConfig, MoEConfig


def from_olmo_trainer(values: Mapping[str, Any], file: str = "config.yaml") -> DecoderConfig:
    """The architecture in the `model` section of an old-trainer `config.yaml`.

    Defaults of absent keys are those of its `ModelConfig`.

    Raises:
      UserError: naming key, value and `file`.
    """
    keys = Keys(values, file).child("model")
    keys.require("activation_type", "swiglu", default="swiglu")
    keys.require("block_type", "sequential", "llama", "moe", default="sequential")
    moe = _trainer_experts(keys) if keys.get("block_type") == "moe" else None
    keys.require("layer_norm_type", "rms", default="default")
    keys.require("layer_norm_with_affine", True, default=True)
    keys.require("rope", True, default=False)
    keys.require("alibi", False, default=False)
    keys.require("include_bias", False, default=True)
    keys.require("bias_for_layer_norm", False, default=keys.get("include_bias", True))
    keys.require("scale_logits", False, default=False)
    keys.require("embedding_layer_norm", False, default=False)
    keys.require("clip_qkv", None)
    for dropout in ("attention_dropout", "residual_dropout", "embedding_dropout"):
        keys.require(dropout, 0, default=0.1)
    # Only the two arrangements that our block has: norms on outputs with QK-norm, or norms on
    # inputs.
    norm_after = keys.flag("norm_after", False)
    qk_norm = keys.flag("attention_layer_norm", False)
    if qk_norm:
        keys.require("attention_layer_norm_with_affine", True, default=True)
    else:
        keys.skip("attention_layer_norm_with_affine")

    d_model = keys.integer("d_model", 768)
    n_heads = keys.integer("n_heads", 12)
    if d_model % n_heads:
        raise keys.error("n_heads", f"does not divide d_model {d_model}")
    multi_query = keys.flag("multi_query_attention", False)
    # The feed-forward width counts gate and up together.
    hidden = keys.integer("mlp_hidden_size", keys.integer("mlp_ratio", 4) * d_model)
    if hidden % 2:
        raise keys.error("mlp_hidden_size", "must be even: it holds gate and up")
    vocab_size = keys.integer("vocab_size", 50257)
    config = DecoderConfig(
        d_model=d_model,
        n_layers=keys.integer("n_layers", 12),
        n_heads=n_heads,
        n_kv_heads=keys.integer("n_kv_heads", 1 if multi_query else n_heads),
        head_dim=d_model // n_heads,
        d_ff=hidden // 2,
        # `embedding_size: null` means unpadded; absent means the class default.
        vocab_size=keys.integer(
            "embedding_size", vocab_size if "embedding_size" in keys.values else 50304
        ),
        max_seq_len=keys.integer("max_sequence_length", 1024),
        norm_position="output" if norm_after else "input",
        qk_norm="full" if qk_norm else "none",
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        rope_theta=keys.number("rope_theta", 10_000.0),
        tie_embeddings=keys.flag("weight_tying", True),
        moe=moe,
    )
    keys.skip(
        "alibi_bias_max", "block_group_size", "emb_init_std", "eos_token_id", "flash_attention",
        "init_cutoff_factor", "init_device", "init_fn", "init_std", "pad_token_id", "precision",
        "rope_full_precision", "scale_emb_init",
    )  # fmt: skip
    keys.refuse_unread()
    return config


def _trainer_experts(keys: Keys) -> MoEConfig:
    """The `moe_*` keys of the branch that trained OLMoE, with the defaults of its `ModelConfig`."""
    keys.require("moe_dropless", True, default=True)
    keys.require("moe_interleave", False, default=False)
    # A shared expert of that branch is weighed inside megablocks; no checkpoint of it is known.
    keys.require("moe_shared_expert", False, default=False)
    keys.require("norm_after", False, default=False)
    keys.skip(
        "moe_capacity_factor", "moe_lbl_in_fp32", "moe_log_expert_assignment", "moe_loss_weight",
        "moe_mlp_impl", "moe_zloss_weight",
    )  # fmt: skip
    experts = keys.integer("moe_num_experts", 8)
    chosen = keys.integer("moe_top_k", 2)
    if chosen > experts:
        raise keys.error("moe_top_k", f"is more than moe_num_experts {experts}")
    return MoEConfig(experts, chosen)


def from_olmo_core(values: Mapping[str, Any], file: str = "config.json") -> DecoderConfig:
    """The architecture under `model` of an OLMo-core `config.json`.

    Raises:
      UserError: naming key, value and `file`.
    """
    keys = Keys(values, file).child("model")
    keys.skip(
        "_CLASS_",
        "dtype",
        "init_method",
        "init_seed",
        "init_std",
        "init_device",
        "embedding_init_std",
        "freeze_params",
    )
    keys.require("name", "default", default="default")
    block = keys.child("block")
    block.skip("_CLASS_")
    block_name = block.get("name", "default")
    if block_name not in ("default", "reordered_norm"):
        raise block.error("name", "is not supported (only default or reordered_norm)")
    block.require("dropout", 0, default=0)

    # `attention` was renamed to `sequence_mixer`.
    attention = block.child(
        "sequence_mixer" if block.get("sequence_mixer") is not None else "attention"
    )
    attention.skip("_CLASS_", "dtype", "use_flash", "backend")
    # A fused attention stores w_qkv; its checkpoint then misses w_q and is refused with that name.
    attention.require("name", "default", default="default")
    attention.require("bias", False, default=True)
    attention.require("dropout", 0, default=0)
    attention.require("use_head_qk_norm", False, default=False)
    qk_norm = attention.get("qk_norm") is not None
    theta = _core_rope_theta(attention)

    feed_forward = block.child("feed_forward")
    feed_forward.skip("_CLASS_", "dtype")
    feed_forward.require("name", "default", default="default")
    feed_forward.require("bias", False, default=True)
    feed_forward.require("activation", "silu", default="silu")

    head = keys.child("lm_head")
    head.skip("_CLASS_", "dtype", "loss_implementation")
    head.require("name", "default", default="default")
    head.require("bias", False, default=True)

    norms = [block.child("layer_norm"), head.child("layer_norm")]
    if qk_norm:
        norms.append(attention.child("qk_norm"))
    eps = {_core_norm_eps(norm) for norm in norms}
    if len(eps) > 1:
        raise UserError(f"{file}: layer norms with different eps {sorted(eps)} are not supported")

    d_model = keys.integer("d_model")
    n_heads = attention.integer("n_heads", 16)
    if attention.get("head_dim") is None and d_model % n_heads:
        raise attention.error("n_heads", f"does not divide d_model {d_model}")
    config = DecoderConfig(
        d_model=d_model,
        n_layers=keys.integer("n_layers"),
        n_heads=n_heads,
        n_kv_heads=attention.integer("n_kv_heads", n_heads),
        head_dim=attention.integer("head_dim", d_model // n_heads),
        d_ff=feed_forward.integer("hidden_size"),
        vocab_size=keys.integer("vocab_size"),
        max_seq_len=_core_sequence_length(values),
        norm_position="output" if block_name == "reordered_norm" else "input",
        qk_norm="full" if qk_norm else "none",
        norm_eps=eps.pop(),
        rope_theta=theta,
    )
    for section in (keys, block, attention, feed_forward, head):
        section.refuse_unread()
    return config


def _core_rope_theta(attention: Keys) -> float:
    rope = attention.child("rope")
    rope.skip("_CLASS_", "full_precision")
    # The complex variant rotates neighbouring components, another layout.
    rope.require("name", "default", default="default")
    rope.require("scaling", None)
    theta = rope.number("theta", 500_000.0)
    rope.refuse_unread()
    return theta


def _core_norm_eps(norm: Keys) -> float:
    norm.skip("_CLASS_", "dtype", "full_precision")
    norm.require("name", "rms", "fused_rms", default="default")
    norm.require("bias", False, default=True)
    norm.require("elementwise_affine", True, default=True)
    eps = norm.number("eps", 1e-5)
    norm.refuse_unread()
    return eps


def _core_sequence_length(values: Mapping[str, Any]) -> int:
    """The training sequence length, which OLMo-core keeps with the data; its model has no limit of
    its own.
    """
    for section, key in (("dataset", "sequence_length"), ("train_module", "max_sequence_length")):
        found = (values.get(section) or {}).get(key)
        if isinstance(found, int) and found > 0:
            return found
    return 4096
