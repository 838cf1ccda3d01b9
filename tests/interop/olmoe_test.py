"""OLMoE checkpoints: other layouts of the same tensors, settings that are refused, verbs."""

import json
import pathlib

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from safetensors.numpy import save_file

import olmax
from olmax import sharding
from olmax.errors import UserError
from olmax.interop import load_config, load_model, save_huggingface
from olmax.interop.hf_config import from_huggingface, to_huggingface
from olmax.interop.olmo_config import from_olmo_trainer
from olmax.models import Decoder, MoEConfig, get_preset
from tests.interop import golden_models
from tests.interop.load_checkpoint_test import assert_same_params

CASE = golden_models.CASES["olmoe"]
TENSORS = golden_models.weights("olmoe")
LAYERS, EXPERTS = range(CASE["num_hidden_layers"]), range(CASE["num_experts"])

# The released configuration, with the keys that say something of the model.
RELEASED = dict(
    model_type="olmoe", architectures=["OlmoeForCausalLM"], vocab_size=50304, hidden_size=2048,
    intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16,
    hidden_act="silu", max_position_embeddings=4096, initializer_range=0.02, rms_norm_eps=1e-5,
    pad_token_id=1, bos_token_id=None, eos_token_id=50279, tie_word_embeddings=False,
    rope_theta=10000.0, rope_scaling=None, attention_bias=False, attention_dropout=0.0,
    clip_qkv=None, num_experts_per_tok=8, num_experts=64, output_router_logits=False,
    router_aux_loss_coef=0.01, norm_topk_prob=False, use_cache=True, torch_dtype="bfloat16",
)  # fmt: skip

TRAINER_MODEL = dict(
    d_model=64, n_heads=4, n_layers=3, mlp_hidden_size=80, weight_tying=False, alibi=False,
    rope=True, rope_full_precision=True, attention_dropout=0.0, include_bias=False,
    block_type="moe", layer_norm_type="rms", layer_norm_with_affine=True, layer_norm_eps=1e-5,
    bias_for_layer_norm=False, attention_layer_norm=True, attention_layer_norm_with_affine=True,
    activation_type="swiglu", residual_dropout=0.0, embedding_dropout=0.0,
    max_sequence_length=128, vocab_size=310, embedding_size=320, eos_token_id=0, pad_token_id=1,
    init_fn="normal", init_std=0.02, init_cutoff_factor=3, moe_num_experts=12, moe_top_k=4,
    moe_mlp_impl="sparse", moe_zloss_weight=0.001, moe_loss_weight=0.01, moe_dropless=True,
    moe_log_expert_assignment=True, moe_lbl_in_fp32=False, moe_capacity_factor=1.25,
    moe_shared_expert=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded(checkpoints):
    return load_model(checkpoints["olmoe"])


def stacked(layer: int, name: str) -> np.ndarray:
    prefix = f"model.layers.{layer}.mlp.experts."
    return np.stack([TENSORS[f"{prefix}{e}.{name}_proj.weight"] for e in EXPERTS])


def test_the_released_configuration_is_the_preset():
    assert from_huggingface(RELEASED) == get_preset("olmoe-1b-7b")
    back = from_huggingface(to_huggingface(get_preset("olmoe-1b-7b")))
    assert back == get_preset("olmoe-1b-7b")


def test_absent_keys_take_the_class_defaults():
    config = from_huggingface({"model_type": "olmoe"})
    assert (config.d_ff, config.d_model, config.n_layers, config.norm_eps) == (2048, 2048, 16, 1e-5)
    assert config.moe == MoEConfig(64, 8) and config.max_seq_len == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(clip_qkv=8.0), "clip_qkv = 8.0 is not supported"),
        (dict(num_experts_per_tok=65), "num_experts_per_tok = 65 is more than num_experts = 64"),
        (dict(num_local_experts=8), "num_local_experts = 8 contradicts"),
        (dict(norm_topk_prob="yes"), "norm_topk_prob = 'yes' must be true or false"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(shared_expert_intermediate_size=512), "shared_expert_intermediate_size"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2}), "yarn"),
    ],
)
def test_what_changes_the_computation_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_huggingface(RELEASED | change)


def test_normalised_weights_are_read():
    assert from_huggingface(RELEASED | dict(norm_topk_prob=True)).moe == MoEConfig(64, 8, True)


def test_experts_in_packed_tensors_are_the_same_model(loaded, tmp_path):
    packed = {name: value for name, value in TENSORS.items() if ".experts." not in name}
    for n in LAYERS:
        gate_up = np.concatenate([stacked(n, "gate"), stacked(n, "up")], axis=1)
        packed[f"model.layers.{n}.mlp.experts.gate_up_proj"] = gate_up
        packed[f"model.layers.{n}.mlp.experts.down_proj"] = stacked(n, "down")
    (tmp_path / "config.json").write_text(json.dumps(CASE))
    save_file(packed, tmp_path / "model.safetensors")
    assert_same_params(load_model(tmp_path), loaded)


def test_checkpoint_of_the_training_code_is_the_same_model(loaded, tmp_path):
    tensors = {
        "transformer.wte.weight": TENSORS["model.embed_tokens.weight"],
        "transformer.ln_f.weight": TENSORS["model.norm.weight"],
        "transformer.ff_out.weight": TENSORS["lm_head.weight"],
    }
    for n in LAYERS:
        old, new = f"transformer.blocks.{n}.", f"model.layers.{n}."
        qkv = [TENSORS[f"{new}self_attn.{x}_proj.weight"] for x in "qkv"]
        down = stacked(n, "down").transpose(0, 2, 1)
        tensors |= {
            old + "att_proj.weight": np.concatenate(qkv),
            old + "attn_out.weight": TENSORS[new + "self_attn.o_proj.weight"],
            old + "q_norm.weight": TENSORS[new + "self_attn.q_norm.weight"],
            old + "k_norm.weight": TENSORS[new + "self_attn.k_norm.weight"],
            old + "attn_norm.weight": TENSORS[new + "input_layernorm.weight"],
            old + "ff_norm.weight": TENSORS[new + "post_attention_layernorm.weight"],
            old + "ffn.router.layer.weight": TENSORS[new + "mlp.gate.weight"],
            old + "ffn.experts.mlp.w1": stacked(n, "gate").reshape(-1, 64),
            old + "ffn.experts.mlp.v1": stacked(n, "up").reshape(-1, 64),
            old + "ffn.experts.mlp.w2": np.ascontiguousarray(down.reshape(-1, 64)),
        }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": TRAINER_MODEL}))
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_config(tmp_path) == loaded.config
    assert_same_params(load_model(tmp_path), loaded)


@pytest.mark.parametrize(
    "change",
    [dict(moe_dropless=False), dict(moe_interleave=True), dict(moe_shared_expert=True),
     dict(moe_top_k=13), dict(norm_after=True), dict(moe_jitter=0.1)],
)  # fmt: skip
def test_training_settings_that_change_the_function_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        from_olmo_trainer({"model": TRAINER_MODEL | change})


def test_every_device_gets_its_experts(loaded, checkpoints):
    mesh = sharding.make_mesh("fsdp=2,expert=4")
    model = load_model(checkpoints["olmoe"], mesh=mesh)
    assert model.blocks.moe.gate_up[...].sharding.spec[1] == "expert"
    assert_same_params(model, loaded)


def test_missing_expert_is_named(checkpoints, tmp_path):
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    (tmp_path / "config.json").write_text(json.dumps(CASE))
    save_file({k: v for k, v in TENSORS.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"missing: {name}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("olmoe-tiny-shared", "shared expert"),
        ("olmoe-tiny-expert-choice", "expert choice"),
        ("olmoe-tiny-dense", "no experts"),
    ],
)
def test_what_transformers_cannot_compute_is_not_exported(tmp_path, preset, message):
    model = nnx.eval_shape(lambda: Decoder(get_preset(preset), rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=message):
        save_huggingface(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_and_generations_of_the_handle_are_transformers(checkpoints):
    golden = np.load(pathlib.Path(__file__).parent / "golden" / "olmoe.npz")
    model = olmax.load(checkpoints["olmoe"])
    rows = [
        ([x for x in c if x >= 0], [x for x in t if x >= 0])
        for c, t in zip(golden["contexts"].tolist(), golden["continuations"].tolist(), strict=True)
    ]
    scores = model.score(rows)
    np.testing.assert_allclose([s.logprob for s in scores], golden["logprobs"], rtol=1e-4)
    assert [s.is_greedy for s in scores] == golden["is_greedy"].tolist()
    prompts = [[x for x in row if x >= 0] for row in golden["prompts"].tolist()]
    found = model.generate_ids(prompts, max_new_tokens=golden["generations"].shape[1])
    assert [list(map(int, row)) for row in found] == golden["generations"].tolist()


def test_bfloat16_stays_near_float32(loaded, checkpoints):
    tokens = np.arange(40, dtype=np.int32)[None] * 7 % 320
    half = load_model(checkpoints["olmoe"], param_dtype="bfloat16", compute_dtype="bfloat16")
    logits = jax.jit(lambda model: model(tokens))
    difference = np.abs(np.asarray(logits(half)) - np.asarray(logits(loaded)))
    # Routing may flip for single tokens; most stay close.
    assert np.median(difference) < 0.1
