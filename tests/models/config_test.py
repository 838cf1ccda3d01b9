"""Counts from the configuration alone (specs/olmo2.md section 1, specs/ladder.md section 1)."""

import jax
import pytest
from flax import nnx

from olmax.errors import UserError
from olmax.models import PRESETS, Decoder, DecoderConfig, get_preset

# preset: all parameters, without the input embedding, without either vocabulary matrix.
PARAMS = {
    "olmo2-1b": (1_484_916_736, 1_279_395_840, 1_073_874_944),
    "olmo2-7b": (7_298_617_344, 6_887_575_552, 6_476_533_760),
    "olmo2-13b": (13_716_198_400, 13_202_396_160, 12_688_593_920),
    "olmo2-32b": (32_234_279_936, 31_720_477_696, 31_206_675_456),
}

# preset: parameters without the input embedding, training FLOPs per token at 4096.
LADDER = {
    "olmo2-190m": (190_354_176, 1_903_391_232),
    "olmo2-370m": (371_262_464, 3_443_922_944),
    "olmo2-600m": (597_382_464, 5_180_751_744),
    "olmo2-760m": (758_220_288, 6_373_843_968),
    "olmo2-1b": (1_279_395_840, 10_109_071_360),
    "olmo2-7b": (6_887_575_552, 49_412_071_424),
    "olmo2-13b": (13_202_396_160, 91_335_915_520),
}

# The sizes the model cards of Meta and Mistral give: 6.74B, 68.98B, 8.03B, 70.55B, 405.85B, 46.7B.
OTHERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_counts_equal_the_published_ones(name):
    config = get_preset(name)
    total, without_input, without_both = PARAMS[name]
    assert config.num_params == total
    assert config.num_non_embedding_params == without_input
    assert config.num_non_embedding_params - config.vocab_size * config.d_model == without_both


@pytest.mark.parametrize("name", LADDER)
def test_flops_per_token_equal_the_ladders(name):
    config = get_preset(name)
    assert (config.num_non_embedding_params, config.flops_per_token(4096)) == LADDER[name]


@pytest.mark.parametrize("name", OTHERS)
def test_parameter_counts_of_other_families(name):
    assert get_preset(name).num_params == OTHERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_counts_agree_with_the_module(name):
    config = get_preset(name)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves_with_path(nnx.state(model, nnx.Param))
    assert sum(leaf.size for _, leaf in leaves) == config.num_params
    assert not [path for path, _ in leaves if "bias" in jax.tree_util.keystr(path)]


def test_matmul_flops_count_the_lower_triangle_once():
    config = get_preset("olmo2-7b")
    full = config.matmul_flops_per_token(4096, causal=False)
    causal = config.matmul_flops_per_token(4096)
    assert full - causal == 6 * 32 * 4096 * 4096
    assert full == 6 * config.num_non_embedding_params + 12 * 32 * 4096 * 4096


def test_unknown_preset_names_near_ones():
    with pytest.raises(UserError, match=r"olmo2-7b"):
        get_preset("olmo-7b")


def test_heads_must_group():
    with pytest.raises(UserError, match=r"n_heads=6 .* n_kv_heads=4"):
        DecoderConfig(d_model=48, n_layers=1, n_heads=6, n_kv_heads=4, head_dim=8, d_ff=64)
