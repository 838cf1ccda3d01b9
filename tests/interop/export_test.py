"""Exported directories: bit-exact on the way back, whole or absent, loadable by transformers."""

import dataclasses
import json
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from olmax import sharding
from olmax.data.tokenizer import Tokenizer
from olmax.errors import UserError
from olmax.interop import load_model, save, save_huggingface
from olmax.models import Decoder, get_preset
from tests.interop import golden_models
from tests.interop.load_checkpoint_test import assert_same_params


@pytest.mark.parametrize("name", golden_models.CASES)
def test_import_then_export_reproduces_the_tensors(tmp_path, checkpoints, name):
    save_huggingface(load_model(checkpoints[name]), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    expected = golden_models.weights(name)
    assert got.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(got[tensor], value, err_msg=tensor)


@pytest.mark.parametrize("preset", ["olmo2-tiny-gqa", "llama3.1-tiny"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_then_import_is_bit_exact(tmp_path, preset, dtype):
    model = Decoder(get_preset(preset), rngs=nnx.Rngs(3))
    save_huggingface(model, tmp_path / "out", dtype=dtype, max_shard_bytes=200_000)
    back = load_model(tmp_path / "out", param_dtype=dtype)
    assert back.config == model.config
    assert_same_params(back, model, dtype=jnp.dtype(dtype))


def test_shards_keep_to_their_size_and_the_index_is_right(tmp_path, checkpoints):
    limit = 40_000
    save_huggingface(load_model(checkpoints["olmo2_mha"]), tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    seen, total = {}, 0
    for file in files:
        # The library itself, so that our own reading of the format is not its own judge.
        with safe_open(file, framework="numpy") as handle:
            sizes = [handle.get_tensor(name).nbytes for name in handle.keys()]  # noqa: SIM118
            seen |= dict.fromkeys(handle.keys(), file.name)
            assert handle.metadata() == {"format": "pt"}
        assert sum(sizes) <= limit or len(sizes) == 1
        total += sum(sizes)
    assert index == {"metadata": {"total_size": total}, "weight_map": seen}


def test_a_sharded_model_exports_the_same(tmp_path, checkpoints):
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    save_huggingface(load_model(checkpoints["olmo2_gqa"], mesh=mesh), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    for tensor, value in golden_models.weights("olmo2_gqa").items():
        np.testing.assert_array_equal(got[tensor], value, err_msg=tensor)


def test_an_existing_directory_is_not_touched(tmp_path, checkpoints):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        save_huggingface(load_model(checkpoints["olmo2_mha"]), tmp_path / "out")
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_nothing_is_left_after_an_error(tmp_path, checkpoints, monkeypatch):
    model = load_model(checkpoints["olmo2_mha"])

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_write_json", full_disk)
    with pytest.raises(UserError, match=r"out: cannot be written \(No space left on device\)"):
        save_huggingface(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_do_not_fit_in_float16(tmp_path, checkpoints):
    model = load_model(checkpoints["olmo2_mha"])
    model.final_norm.scale[...] = model.final_norm.scale[...] * 1e6
    with pytest.raises(UserError, match=r"model\.norm\.weight: values beyond 65504"):
        save_huggingface(model, tmp_path / "out", dtype="float16")
    save_huggingface(model, tmp_path / "out", dtype="bfloat16")


@pytest.fixture(scope="module")
def wide():
    """A tiny model with the vocabulary of dolma2."""
    config = dataclasses.replace(
        get_preset("olmo2-tiny"), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8,
        d_ff=32, vocab_size=100352,
    )  # fmt: skip
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract))


def test_tokenizer_files(tmp_path, wide, dolma2, checkpoints):
    save_huggingface(wide, tmp_path / "out", tokenizer=dolma2.parent)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == dolma2.read_bytes()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    special = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    assert special == {"bos": None, "eos": 100257, "pad": 100277}
    # A companion file goes with it, and what it says counts.
    companion = dolma2.parent / "tokenizer_config.json"
    companion.write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    save_huggingface(wide, tmp_path / "again", tokenizer=dolma2)
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (100265, None)
    assert (tmp_path / "again" / "tokenizer_config.json").read_text() == companion.read_text()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        save_huggingface(wide, tmp_path / "third", tokenizer=tmp_path / "absent")
    with pytest.raises(UserError, match="ids up to 100277, the model only 320"):
        model = load_model(checkpoints["olmo2_mha"])
        save_huggingface(model, tmp_path / "third", tokenizer=dolma2)
    assert not (tmp_path / "third").exists()


def test_a_tokenizer_object(tmp_path, wide, dolma2):
    tokenizer = Tokenizer.from_file(dolma2)
    save_huggingface(wide, tmp_path / "out", tokenizer=tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (100257, 100277)
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.fixture
def dolma2(tmp_path, data_dir):
    """The dolma2 tokenizer.json in a directory of its own."""
    (tmp_path / "source").mkdir()
    content = (data_dir / "dolma2_tokenizer" / "allenai_dolma2.json").read_bytes()
    (tmp_path / "source" / "tokenizer.json").write_bytes(content)
    return tmp_path / "source" / "tokenizer.json"


@pytest.fixture
def peers_python(repository):
    """Python of the reference environment."""
    python = repository / ".peers" / "bin" / "python"
    if not python.exists():
        pytest.skip("no reference environment; `make peers` builds it")
    return python


def run_peers(python, script, *arguments):
    subprocess.run(
        [python, "-c", script, *arguments], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


_LOGITS = """
import sys, numpy, torch, transformers
for directory in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        numpy.save(directory + "/logits", model(torch.arange(96)[None]).logits.numpy())
"""


def test_transformers_computes_the_same_from_what_we_write(tmp_path, checkpoints, peers_python):
    models = {name: load_model(path) for name, path in checkpoints.items()}
    for name, model in models.items():
        save_huggingface(model, tmp_path / name, max_shard_bytes=60_000)
    run_peers(peers_python, _LOGITS, *(tmp_path / name for name in models))
    for name, model in models.items():
        expected = np.load(tmp_path / name / "logits.npy")
        got = model(np.arange(96, dtype=np.int32)[None])
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4, err_msg=name)


_TOKENIZER = """
import sys, json, transformers
directory, out = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
texts = json.load(open(out))
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
json.dump(dict(ids=ids, eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
               texts=[tokenizer.decode(x) for x in ids]), open(out, "w"))
"""

TEXTS = {
    "1234567 tokens": [4513, 10961, 22, 11460],
    " the\n\n  café naïve 日本語": [279, 271, 220, 53050, 95980, 588, 76502, 22656, 45918, 252],
    "The capital of France is Paris.<|endoftext|>": [791, 6864, 315, 9822, 374, 12366, 13, 100257],
    "a . b , c 's": [64, 662, 293, 1174, 272, 364, 82],
}


def test_transformers_loads_the_tokenizer(tmp_path, wide, dolma2, peers_python):
    save_huggingface(wide, tmp_path / "out", tokenizer=dolma2)
    (tmp_path / "texts.json").write_text(json.dumps(list(TEXTS)))
    run_peers(peers_python, _TOKENIZER, tmp_path / "out", tmp_path / "texts.json")
    got = json.loads((tmp_path / "texts.json").read_text())
    assert (got["eos"], got["pad"]) == (100257, 100277)
    assert got["ids"] == list(TEXTS.values())
    assert got["texts"] == list(TEXTS)
