"""config.json in and out."""

import copy
import json

import pytest

from olmax.errors import UserError
from olmax.interop.hf_config import from_huggingface, to_huggingface
from olmax.models import PRESETS, Llama3RopeScaling, get_preset
from tests.interop import golden_models

OLMO2 = golden_models.CASES["olmo2_gqa"]
LLAMA = golden_models.CASES["llama_scaled_tied"]
LLAMA3 = LLAMA["rope_scaling"]


def changed(config, **changes):
    config = copy.deepcopy(config)
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    return config


def test_released_olmo2_7b():
    # Keys and values as spec section 8 lists them.
    config = from_huggingface(
        dict(
            architectures=["Olmo2ForCausalLM"], model_type="olmo2", hidden_size=4096,
            intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, hidden_act="silu", max_position_embeddings=4096,
            initializer_range=0.02, rms_norm_eps=1e-6, rope_theta=500000, rope_scaling=None,
            attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False,
            vocab_size=100352, eos_token_id=100257, pad_token_id=100277, bos_token_id=None,
            use_cache=True, torch_dtype="float32", transformers_version="4.47.0.dev0",
        )
    )  # fmt: skip
    assert config == get_preset("olmo2-7b")


def test_released_llama_31_8b():
    config = from_huggingface(
        dict(
            architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False,
            attention_dropout=0.0, bos_token_id=128000, eos_token_id=128001, hidden_act="silu",
            hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
            max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
            num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
            rope_scaling=dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                              original_max_position_embeddings=8192, rope_type="llama3"),
            rope_theta=500000.0, tie_word_embeddings=False, torch_dtype="bfloat16",
            transformers_version="4.43.0.dev0", use_cache=True, vocab_size=128256,
        )
    )  # fmt: skip
    assert config == get_preset("llama3.1-8b")


@pytest.mark.parametrize(
    ("model_type", "eps", "vocab"), [("olmo2", 1e-5, 50304), ("llama", 1e-6, 32000)]
)
def test_absent_keys_take_the_defaults_of_the_transformers_class(model_type, eps, vocab):
    config = from_huggingface({"model_type": model_type})
    assert (config.norm_eps, config.vocab_size) == (eps, vocab)
    assert (config.rope_theta, config.max_seq_len, config.tie_embeddings) == (1e4, 2048, False)
    assert (config.d_model, config.n_layers, config.d_ff) == (4096, 32, 11008)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (32, 32, 128)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_theta=5e5, rope_scaling=LLAMA3),
        dict(rope_theta=5e5, rope_scaling=changed(LLAMA3, rope_type=..., type="llama3")),
        dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_theta=..., rope_scaling=...),
        dict(rope_parameters=LLAMA3, rope_theta=5e5, rope_scaling=...),
        dict(rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_theta=5e5, rope_scaling=LLAMA3),
    ],
)
def test_old_and_new_rope_keys(rope):
    config = from_huggingface(changed(LLAMA, **rope))
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3RopeScaling(8.0, 1.0, 4.0, 32)


def test_original_length_defaults_to_the_maximal_length():
    scaling = changed(LLAMA3, original_max_position_embeddings=...)
    config = from_huggingface(changed(LLAMA, rope_scaling=scaling))
    assert config.rope_scaling.original_max_position_embeddings == 256


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (dict(model_type="qwen2"), "model_type"),
        (dict(model_type=...), "model_type"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(mlp_bias=True), "mlp_bias"),
        (dict(hidden_act="gelu"), "hidden_act"),
        (dict(attention_dropout=0.1), "attention_dropout"),
        (dict(sliding_window=4096), "sliding_window"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_type"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "type"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type"),
        (dict(rope_scaling=changed(LLAMA3, factor=...)), "factor"),
        (dict(rope_scaling={**LLAMA3, "attention_factor": 1.2}), "attention_factor"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "rope_theta"),
        (dict(rope_parameters={**LLAMA3, "factor": 4.0}), "rope_parameters"),
        (dict(rope_scaling={**LLAMA3, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (dict(original_max_position_embeddings=64), "original_max_position_embeddings"),
        (dict(is_encoder_decoder=True), "is_encoder_decoder"),
        (dict(auto_map={"AutoModelForCausalLM": "own.Model"}), "auto_map"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
        (dict(embedding_multiplier=12), "embedding_multiplier"),
        (dict(num_local_experts=8), "num_local_experts"),
        (dict(hidden_size="64"), "hidden_size"),
        (dict(num_hidden_layers=0), "num_hidden_layers"),
        (dict(hidden_size=66), "num_attention_heads"),
        (dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
    ],
)
def test_refused(changes, key):
    values = changed(LLAMA, **changes)
    with pytest.raises(UserError) as error:
        from_huggingface(values, "models/x/config.json")
    message = str(error.value)
    assert message.startswith("models/x/config.json: ")
    assert f"{key} = " in message
    assert "\n" not in message


def test_keys_that_change_nothing_pass(caplog):
    extra = dict(
        pretraining_tp=2, use_cache=False, layer_types=["full_attention"] * 3, sliding_window=None,
        _name_or_path="x", head_dim=None, hidden_act="swish", transformers_version="5.1.0",
        unsloth_fixed=True,
    )  # fmt: skip
    assert from_huggingface({**LLAMA, **extra}) == from_huggingface(LLAMA)
    assert "unsloth_fixed" in caplog.text
    assert "sliding_window" not in caplog.text


ONLY_OURS = {
    # Experts without QK-norm (Mixtral's own type is not written), and QK-norm before experts that
    # are not there.
    "olmoe-ablation-8e",
    "olmoe-ablation-32e",
    "olmoe-ablation-64e",
    "olmoe-ablation-128e",
    "olmoe-tiny-dense",
    "mixtral-8x7b",
    # A shared expert, and experts that choose.
    "olmoe-ablation-shared",
    "olmoe-tiny-shared",
    "olmoe-ablation-expert-choice",
    "olmoe-tiny-expert-choice",
}


@pytest.mark.parametrize("preset", sorted(ONLY_OURS))
def test_ablations_that_no_hugging_face_model_computes_are_refused(preset):
    with pytest.raises(UserError, match="no Hugging Face model type"):
        to_huggingface(get_preset(preset), dtype="bfloat16", eos_token_id=7)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - ONLY_OURS))
def test_there_and_back(preset):
    config = get_preset(preset)
    values = json.loads(json.dumps(to_huggingface(config, dtype="bfloat16", eos_token_id=7)))
    assert from_huggingface(values) == config
    assert values["eos_token_id"] == 7
    # Readable by old and by new transformers.
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == config.rope_theta
    assert values["torch_dtype"] == values["dtype"] == "bfloat16"


def test_architecture_without_a_hugging_face_equivalent():
    import dataclasses

    config = dataclasses.replace(get_preset("olmo2-tiny"), norm_position="input")
    with pytest.raises(UserError, match="norm_position='input'"):
        to_huggingface(config)
