"""Checkpoints with the names of the old OLMo trainer and of OLMo-core load as the same model."""

import base64
import json
import pickle

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from olmax.errors import UserError
from olmax.interop import detect, load_config, load_model
from olmax.interop.olmo_config import from_olmo_core, from_olmo_trainer
from olmax.interop.tensor_files import decode_name
from olmax.models import get_preset
from tests.interop import golden_models

TENSORS = golden_models.weights("olmo2_mha")
LAYERS = range(golden_models.CASES["olmo2_mha"]["num_hidden_layers"])
TOKENS = np.arange(40, dtype=np.int32)[None]

TRAINER_MODEL = dict(
    d_model=64, n_heads=4, n_layers=3, mlp_hidden_size=192, weight_tying=False, alibi=False,
    rope=True, rope_theta=500000, flash_attention=True, attention_dropout=0.0, include_bias=False,
    block_type="sequential", layer_norm_type="rms", layer_norm_with_affine=True,
    layer_norm_eps="1e-6", bias_for_layer_norm=False, attention_layer_norm=True,
    attention_layer_norm_with_affine=True, norm_after=True, activation_type="swiglu",
    residual_dropout=0.0, embedding_dropout=0.0, max_sequence_length=128, vocab_size=300,
    embedding_size=320, eos_token_id=1, pad_token_id=2, init_device="meta", init_fn="normal",
    init_std=0.02, init_cutoff_factor=3,
)  # fmt: skip

NORM = {
    "_CLASS_": "olmo_core.nn.layer_norm.LayerNormConfig",
    "name": "rms",
    "eps": 1e-6,
    "bias": False,
}
CORE_MODEL = {
    "_CLASS_": "olmo_core.nn.transformer.config.TransformerConfig",
    "d_model": 64,
    "vocab_size": 320,
    "n_layers": 3,
    "name": "default",
    "dtype": "float32",
    "init_method": "normal",
    "init_seed": 0,
    "block": {
        "name": "reordered_norm",
        "attention": {
            "name": "default",
            "n_heads": 4,
            "bias": False,
            "rope": {"name": "default", "theta": 500000, "full_precision": True},
            "qk_norm": NORM,
            "use_flash": False,
            "dtype": "float32",
        },
        "layer_norm": NORM,
        "feed_forward": {"hidden_size": 96, "name": "default", "bias": False, "dtype": "float32"},
    },
    "lm_head": {"name": "default", "layer_norm": NORM, "bias": False, "dtype": "float32"},
}


def trainer_tensors():
    out = {
        "transformer.wte.weight": TENSORS["model.embed_tokens.weight"],
        "transformer.ln_f.weight": TENSORS["model.norm.weight"],
        "transformer.ff_out.weight": TENSORS["lm_head.weight"],
    }
    for n in LAYERS:
        old, new = f"transformer.blocks.{n}.", f"model.layers.{n}."
        qkv = [TENSORS[f"{new}self_attn.{x}_proj.weight"] for x in "qkv"]
        up_gate = [TENSORS[f"{new}mlp.{x}_proj.weight"] for x in ("up", "gate")]
        out |= {
            old + "att_proj.weight": np.concatenate(qkv),
            old + "ff_proj.weight": np.concatenate(up_gate),
            old + "attn_out.weight": TENSORS[new + "self_attn.o_proj.weight"],
            old + "ff_out.weight": TENSORS[new + "mlp.down_proj.weight"],
            old + "q_norm.weight": TENSORS[new + "self_attn.q_norm.weight"],
            old + "k_norm.weight": TENSORS[new + "self_attn.k_norm.weight"],
            old + "attn_norm.weight": TENSORS[new + "post_attention_layernorm.weight"],
            old + "ff_norm.weight": TENSORS[new + "post_feedforward_layernorm.weight"],
        }
    return out


def core_tensors():
    out = {
        "embeddings.weight": TENSORS["model.embed_tokens.weight"],
        "lm_head.norm.weight": TENSORS["model.norm.weight"],
        "lm_head.w_out.weight": TENSORS["lm_head.weight"],
    }
    names = {
        "attention.w_q": "self_attn.q_proj", "attention.w_k": "self_attn.k_proj",
        "attention.w_v": "self_attn.v_proj", "attention.w_out": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
        "attention_norm": "post_attention_layernorm",
        "feed_forward_norm": "post_feedforward_layernorm",
        "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }  # fmt: skip
    for n in LAYERS:
        for core, hf in names.items():
            out[f"blocks.{n}.{core}.weight"] = TENSORS[f"model.layers.{n}.{hf}.weight"]
    return out


def encoded(name):
    # As the trainer's unshard script names the tensors of its safetensors files.
    return base64.urlsafe_b64encode(pickle.dumps(((name,), False))).decode()


@pytest.fixture(scope="module")
def expected(checkpoints):
    return load_model(checkpoints["olmo2_mha"])


@pytest.mark.parametrize("encode", [str, encoded])
def test_old_trainer(tmp_path, expected, encode):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": TRAINER_MODEL, "seed": 6198}))
    tensors = {encode(name): tensor for name, tensor in trainer_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert detect(tmp_path) == "olmo_trainer"
    model = load_model(tmp_path)
    assert model.config == expected.config
    np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))


def test_olmo_core(tmp_path, expected):
    config = {"model": CORE_MODEL, "dataset": {"sequence_length": 128}, "trainer": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(core_tensors(), tmp_path / "model.safetensors")
    assert detect(tmp_path) == "olmo_core"
    model = load_model(tmp_path)
    assert model.config == expected.config
    np.testing.assert_array_equal(model(TOKENS), expected(TOKENS))


def test_swapped_feed_forward_halves_would_show(tmp_path, expected):
    # [gate; up] instead of [up; gate]: the shapes fit, the function does not.
    tensors = trainer_tensors()
    for name, tensor in tensors.items():
        if "ff_proj" in name:
            tensors[name] = np.concatenate(np.split(tensor, 2)[::-1])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": TRAINER_MODEL}))
    save_file(tensors, tmp_path / "model.safetensors")
    assert np.abs(load_model(tmp_path)(TOKENS) - expected(TOKENS)).max() > 0.1


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("OLMo2-1B-stage1", "olmo2-1b"),
        ("OLMo2-7B-stage1", "olmo2-7b"),
        ("OLMo2-13B-stage1", "olmo2-13b"),
    ],
)
def test_official_configurations(data_dir, file, preset):
    text = (data_dir / "olmo2_official_configs" / f"{file}.nopaths.yaml").read_text()
    assert from_olmo_trainer(yaml.safe_load(text)) == get_preset(preset)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (dict(rope=False), "model.rope"),
        (dict(alibi=True), "model.alibi"),
        (dict(include_bias=True), "model.include_bias"),
        (dict(layer_norm_type="default"), "model.layer_norm_type"),
        (dict(clip_qkv=8.0), "model.clip_qkv"),
        (dict(scale_logits=True), "model.scale_logits"),
        (dict(activation_type="gelu"), "model.activation_type"),
        (dict(block_type="parallel"), "model.block_type"),
        (dict(residual_dropout=0.1), "model.residual_dropout"),
        (dict(attention_layer_norm_with_affine=False), "model.attention_layer_norm_with_affine"),
        (dict(mystery=1), "model.mystery"),
    ],
)
def test_old_trainer_refuses(changes, key):
    with pytest.raises(UserError, match=rf"^config\.yaml: {key} = "):
        from_olmo_trainer({"model": {**TRAINER_MODEL, **changes}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "normalized"),
        ("embed_scale", 2.0),
        ("block.name", "peri_norm"),
        ("block.feed_forward_moe", {"num_experts": 8}),
        ("block.attention.bias", True),
        ("block.attention.use_head_qk_norm", True),
        ("block.attention.clip_qkv", 8.0),
        ("block.attention.sliding_window", {"pattern": [1024, -1]}),
        ("block.attention.gate", {"granularity": "headwise"}),
        ("block.attention.rope.name", "complex"),
        ("block.attention.rope.scaling", {"factor": 8.0}),
        ("block.feed_forward.activation", "gelu"),
        ("lm_head.bias", True),
    ],
)
def test_olmo_core_refuses(path, value):
    model = json.loads(json.dumps(CORE_MODEL))
    *parents, key = path.split(".")
    section = model
    for parent in parents:
        section = section[parent]
    section[key] = value
    with pytest.raises(UserError, match=rf"^config\.json: model\.{path} = "):
        from_olmo_core({"model": model})


def test_torch_files_say_how_to_convert(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": TRAINER_MODEL}))
    (tmp_path / "model.pt").write_bytes(b"torch")
    with pytest.raises(UserError, match=r"model\.pt: torch files cannot be read here; .*save_file"):
        load_model(tmp_path)


def test_names_are_decoded_without_running_the_pickle(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    trap = base64.urlsafe_b64encode(pickle.dumps(Trap())).decode()
    assert decode_name(encoded("transformer.wte.weight")) == "transformer.wte.weight"
    assert decode_name("model.norm.weight") == "model.norm.weight"
    assert decode_name("gAnonsense") == "gAnonsense"
    decode_name(trap)
    assert not (tmp_path / "executed").exists()


def test_load_config_alone(checkpoints):
    assert load_config(checkpoints["olmo2_gqa"]).n_kv_heads == 2
