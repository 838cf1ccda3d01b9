"""Tiny checkpoints made from a seed, the same here and in the reference environment; needs numpy
and safetensors only.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

_OLMO2 = dict(
    model_type="olmo2",
    architectures=["Olmo2ForCausalLM"],
    rms_norm_eps=1e-6,
    hidden_act="silu",
    attention_bias=False,
    attention_dropout=0.0,
    initializer_range=0.02,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    use_cache=True,
    torch_dtype="float32",
    max_position_embeddings=128,
    tie_word_embeddings=False,
)
_LLAMA = dict(
    _OLMO2,
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    rms_norm_eps=1e-5,
    mlp_bias=False,
)
_OLMOE = dict(
    _OLMO2,
    model_type="olmoe",
    architectures=["OlmoeForCausalLM"],
    rms_norm_eps=1e-5,
    clip_qkv=None,
    output_router_logits=False,
    router_aux_loss_coef=0.01,
)

CASES: dict[str, dict] = {
    # The keys of transformers 5.
    "olmo2_mha": dict(
        _OLMO2,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    # The keys of transformers 4.
    "olmo2_gqa": dict(
        _OLMO2,
        vocab_size=256,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=500000,
        rope_scaling=None,
    ),
    # The golden sequences are three times as long as the original context, and frequencies of all
    # three bands occur.
    "llama_scaled_tied": dict(
        _LLAMA,
        vocab_size=288,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_head_dim": dict(
        _LLAMA,
        vocab_size=256,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # As released, in miniature: probabilities of the chosen experts as they are.
    "olmoe": dict(
        _OLMOE,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=12,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        rope_theta=10000.0,
        rope_scaling=None,
    ),
    "olmoe_normalized_gqa": dict(
        _OLMOE,
        vocab_size=256,
        hidden_size=48,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def feed_forward(config: dict, prefix: str, matrix) -> dict[str, np.ndarray]:
    """Tensors of one layer's feed-forward block: one, or a router and experts."""
    d, f = config["hidden_size"], config["intermediate_size"]
    experts = [f"experts.{e}." for e in range(config.get("num_experts", 0))] or [""]
    tensors = {}
    for expert in experts:
        tensors |= {
            f"{prefix}mlp.{expert}gate_proj.weight": matrix(f, d, 1.5),
            f"{prefix}mlp.{expert}up_proj.weight": matrix(f, d, 3.0 if expert else 1.0),
            f"{prefix}mlp.{expert}down_proj.weight": matrix(d, f),
        }
    if experts != [""]:
        # Far from uniform, with no near ties at the last chosen expert.
        tensors[f"{prefix}mlp.gate.weight"] = matrix(len(experts), d, 1.0)
    return tensors


def weights(name: str) -> dict[str, np.ndarray]:
    """float32 tensors of a case under their Hugging Face names.

    Larger than at initialisation and with norm weights away from 1, so that a mistake anywhere
    shows in the logits.
    """
    config = CASES[name]
    # RandomState, because its stream is frozen for good; Generator's is not.
    random = np.random.RandomState(sorted(CASES).index(name) + 1)
    d, v = config["hidden_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", d // heads)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (random.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    def scale(size: int) -> np.ndarray:
        return (1 + 0.3 * random.standard_normal(size)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(v, d, gain=d**0.5)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": matrix(heads * head_dim, d, 1.5),
            prefix + "self_attn.k_proj.weight": matrix(kv_heads * head_dim, d, 1.5),
            prefix + "self_attn.v_proj.weight": matrix(kv_heads * head_dim, d),
            prefix + "self_attn.o_proj.weight": matrix(d, heads * head_dim),
            **feed_forward(config, prefix, matrix),
            prefix + "post_attention_layernorm.weight": scale(d),
        }
        if config["model_type"] != "llama":
            tensors |= {
                prefix + "self_attn.q_norm.weight": scale(heads * head_dim),
                prefix + "self_attn.k_norm.weight": scale(kv_heads * head_dim),
            }
        if config["model_type"] == "olmo2":
            tensors[prefix + "post_feedforward_layernorm.weight"] = scale(d)
        else:
            tensors[prefix + "input_layernorm.weight"] = scale(d)
    tensors["model.norm.weight"] = scale(d) * np.float32(
        0.4 if config["tie_word_embeddings"] else 1.0
    )
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(v, d, 2.0)
    return tensors


def write_checkpoint(name: str, directory: pathlib.Path) -> pathlib.Path:
    """Writes a case as a Hugging Face directory and returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CASES[name], indent=2))
    save_file(weights(name), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
