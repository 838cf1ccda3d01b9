"""`olmax.load` on every kind of model path; the handle gives what transformers gives."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx

import olmax
from olmax import pretrained
from olmax.data.tokenizer import Tokenizer, train_bpe
from olmax.errors import UserError
from olmax.interop import save_huggingface
from olmax.models import Decoder
from olmax.sharding import make_mesh
from olmax.training.model_checkpoint import save_model
from tests.interop import golden_models

GOLDEN = pathlib.Path(__file__).parent / "interop" / "golden"


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, pathlib.Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        name: golden_models.write_checkpoint(name, root / name)
        for name in ("olmo2_gqa", "llama_scaled_tied", "olmo2_mha")
    }


@pytest.fixture(scope="module", params=["olmo2_gqa", "llama_scaled_tied"])
def case(request, directories):
    """(handle, golden arrays)."""
    handle = olmax.load(str(directories[request.param]))
    return handle, np.load(GOLDEN / f"{request.param}.npz")


@pytest.fixture(scope="module")
def with_tokenizer(directories, tmp_path_factory) -> pathlib.Path:
    """A Hugging Face directory with a tokenizer."""
    path = tmp_path_factory.mktemp("text") / "model"
    shutil.copytree(directories["olmo2_mha"], path)
    train_bpe(["the cat sat on the mat. " * 9], vocab_size=300).save(path)
    return path


def unpadded(rows):
    return [row[row >= 0].tolist() for row in rows]


def test_logits_scores_and_generations_equal_those_of_transformers(case):
    handle, golden = case
    logits_BLV = handle.logits(golden["tokens"])
    assert logits_BLV.dtype == np.float32
    assert logits_BLV.shape == (*golden["tokens"].shape, handle.config.vocab_size)
    np.testing.assert_allclose(
        logits_BLV[:, golden["positions"]], golden["logits"], rtol=0, atol=2e-4
    )
    pairs = list(zip(unpadded(golden["contexts"]), unpadded(golden["continuations"]), strict=True))
    scores = handle.score(pairs)
    np.testing.assert_allclose([s.logprob for s in scores], golden["logprobs"], rtol=1e-4)
    assert [s.is_greedy for s in scores] == golden["is_greedy"].tolist()
    assert [s.tokens for s in scores] == [len(continuation) for _, continuation in pairs]
    count = golden["generations"].shape[1]
    got = handle.generate_ids(unpadded(golden["prompts"]), max_new_tokens=count)
    assert got == golden["generations"].tolist()


def test_logits_of_any_shape_are_those_of_the_row_alone(case):
    handle, golden = case
    whole = handle.logits(golden["tokens"])
    compiled = pretrained._logits._cache_size()
    short = handle.logits(golden["tokens"][:, :70].tolist())
    assert short.shape[:2] == (2, 70)
    np.testing.assert_allclose(short, whole[:, :70], atol=1e-5)
    one = handle.logits(golden["tokens"][:1, :65])
    np.testing.assert_allclose(one, whole[:1, :65], atol=1e-5)
    # 70 is padded to the 96 of the first call; a single row is another size.
    assert pretrained._logits._cache_size() == compiled + 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], "the rows of ids_BL differ in length"),
        ([1, 2], r"must be \[B, L\], is of shape \[2\]"),
        ([[]], r"must be \[B, L\]"),
        ([[1.0]], "flat list of integers"),
        ([[320]], "token id 320 is outside the model's vocabulary of 320"),
        ([[-1]], "token id -1"),
        ([[1] * 129], "129 tokens are longer than the model's context of 128"),
    ],
)
def test_ids_that_are_no_matrix_of_tokens(with_tokenizer, ids, message):
    with pytest.raises(UserError, match=message):
        olmax.load(with_tokenizer).logits(ids)


def test_text_needs_a_tokenizer_and_ids_do_not(directories):
    handle = olmax.load(directories["olmo2_mha"])
    assert handle.tokenizer is None
    for call in (
        lambda: handle.score([("a", "b")]),
        lambda: handle.generate("a"),
    ):
        with pytest.raises(UserError, match=r"olmo2_mha: no tokenizer.json beside the model"):
            call()
    assert handle.score([([1, 2], [3])])[0].tokens == 1


def test_text_is_encoded_apart_and_nothing_is_added(with_tokenizer):
    handle = olmax.load(with_tokenizer)
    tokenizer = Tokenizer.from_file(with_tokenizer)
    assert isinstance(handle.tokenizer, Tokenizer)
    pairs = [("the ca", "t sat"), ("", "mat"), ("the", " cat")]
    ids = [(tokenizer.encode(c), tokenizer.encode(t)) for c, t in pairs]
    assert ids[0][0] + ids[0][1] != tokenizer.encode("the cat sat")
    ids[1] = ([tokenizer.eos_id], ids[1][1])
    assert handle.score(pairs) == handle.score(ids)
    texts = handle.generate(["the cat", ""], max_new_tokens=6)
    (completion,) = handle.complete("the cat", max_new_tokens=6)
    assert texts[0] == completion.text == tokenizer.decode(completion.ids)
    assert handle.generate("the cat", max_new_tokens=6) == texts[:1]
    assert handle.generate([[5, 6]], max_new_tokens=4) == handle.generate_ids(
        [[5, 6]], max_new_tokens=4
    )
    with pytest.raises(UserError, match="all texts or all lists"):
        handle.generate(["the", [1, 2]])


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_generation_ends_where_transformers_would(with_tokenizer, tmp_path, name):
    path = tmp_path / "model"
    shutil.copytree(with_tokenizer, path)
    prompt = [5, 6, 7]
    free = olmax.load(path).generate_ids([prompt], max_new_tokens=8, stop_token_ids=[])[0]
    (path / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((path / "config.json").read_text()) if name == "config.json" else {}
    (path / name).write_text(json.dumps(values | {"eos_token_id": [free[3], 1]}))
    handle = olmax.load(path)
    assert handle.stop_token_ids == [free[3], 1]
    got = handle.generate_ids([prompt], max_new_tokens=8)[0]
    stops = [i for i, token in enumerate(free) if token in handle.stop_token_ids]
    assert got == free[: stops[0]]


def test_our_checkpoints_load_with_the_tokenizer_of_their_directory(with_tokenizer, tmp_path):
    first = olmax.load(with_tokenizer)
    save_model(first.model, tmp_path / "ours", tokenizer=with_tokenizer / "tokenizer.json")
    again = olmax.load(tmp_path / "ours")
    assert again.config == first.config
    ids = [[1, 2, 3, 4]]
    np.testing.assert_array_equal(again.logits(ids), first.logits(ids))
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_dtypes(with_tokenizer):
    low = olmax.load(with_tokenizer, dtype="bfloat16")
    assert low.model.embedder.embedding[...].dtype == "bfloat16"
    got = low.logits([[1, 2, 3]])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, olmax.load(with_tokenizer).logits([[1, 2, 3]]), atol=0.5)
    with pytest.raises(UserError, match="unknown dtype 'int8'; choose one of float32"):
        olmax.load(with_tokenizer, dtype="int8")


def test_a_mesh_changes_nothing(directories):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    sharded = olmax.load(str(directories["olmo2_gqa"]), mesh=mesh)
    golden = np.load(GOLDEN / "olmo2_gqa.npz")
    logits_BLV = sharded.logits(golden["tokens"])
    np.testing.assert_allclose(
        logits_BLV[:, golden["positions"]], golden["logits"], rtol=0, atol=2e-4
    )


def test_wrong_paths_say_what_a_model_path_may_be(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for path in ("empty", "file", "none"):
        with pytest.raises(UserError, match="a model path is a Hugging Face directory") as error:
            olmax.load(tmp_path / path)
        assert str(tmp_path / path) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_model_without_a_path(with_tokenizer):
    model: Decoder = nnx.clone(olmax.load(with_tokenizer).model)
    assert pretrained.Pretrained(model).tokenizer is None
    tokenizer = Tokenizer.from_file(with_tokenizer)
    handle = pretrained.Pretrained(model, tokenizer=tokenizer)
    assert handle.score([("the", " cat")])[0].tokens == len(tokenizer.encode(" cat"))


def test_exported_models_load_again(with_tokenizer, tmp_path):
    first = olmax.load(with_tokenizer)
    save_huggingface(first.model, tmp_path / "out", tokenizer=first.tokenizer)
    again = olmax.load(tmp_path / "out")
    np.testing.assert_array_equal(again.logits([[1, 2, 3]]), first.logits([[1, 2, 3]]))
    assert again.generate("the", max_new_tokens=3) == first.generate("the", max_new_tokens=3)
