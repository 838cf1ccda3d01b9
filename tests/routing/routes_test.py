"""Routes of a model over text, and the analysis of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from olmax.data.tokenizer import train_bpe
from olmax.errors import UserError
from olmax.models import Decoder, Execution, MoEConfig, get_preset
from olmax.reporting.document import Report
from olmax.routing import collect, windows
from olmax.routing.analysis import analyse
from olmax.routing.report import saturation_table, sections

CONFIG = dataclasses.replace(
    get_preset("olmoe-tiny"), d_model=16, d_ff=8, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8,
    vocab_size=300, max_seq_len=16, moe=MoEConfig(6, 2), init_std=0.3,
)  # fmt: skip
TEXTS = {"code": ["def f(x):\n    return x + 1\n" * 6], "prose": ["The cat sat on the mat. " * 8]}


def made(seed: int, config=CONFIG) -> Decoder:
    execution = Execution(experts="reference", router="reference")
    return nnx.jit(lambda: Decoder(config, execution, rngs=nnx.Rngs(seed)))()


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe((t for group in TEXTS.values() for t in group), vocab_size=270)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    return windows(tokenizer, TEXTS, length=8, tokens=40)


@pytest.fixture(scope="module")
def model():
    return made(0)


def test_windows_are_cut_from_the_concatenated_text(tokenizer, corpus):
    ids = tokenizer.encode_batch(TEXTS["code"])[0]
    # The sixth window passes forty tokens.
    assert corpus["code"].shape == (6, 8)
    assert corpus["code"].ravel().tolist() == ids[:48]
    with pytest.raises(UserError, match="fewer than one window"):
        windows(tokenizer, {"short": ["a"]}, length=8)


def test_routes_are_the_routers_own(model, corpus):
    routes = collect(model, corpus, batch_tokens=40)
    rows = np.concatenate(list(corpus.values()))
    assert routes.experts_NTk.shape == (2, rows.size, 2)

    @jax.jit
    def forward(model, tokens_BL):
        hidden_BLD, record = model.hidden_and_routing(tokens_BL)
        return record.experts_BLk, model.logits(hidden_BLD)

    experts, logits = forward(model, jnp.asarray(rows))
    expected = np.asarray(experts).reshape(2, rows.size, 2)
    np.testing.assert_array_equal(routes.experts_NTk, expected)
    predicted = np.asarray(logits).argmax(-1)
    np.testing.assert_array_equal(routes.predicted_T, predicted.ravel())
    np.testing.assert_array_equal(routes.next_T[:8], [*rows[0, 1:], -1])
    assert len(routes.of(1, "prose")) == corpus["prose"].size


@pytest.mark.slow
def test_routes_do_not_depend_on_the_mesh(model, corpus):
    from olmax import sharding

    mesh = sharding.make_mesh("expert=2", jax.devices()[:2])
    sharded = sharding.init_decoder(CONFIG, seed=0, mesh=mesh)
    nnx.update(sharded, nnx.state(model))
    alone, cut = collect(model, corpus), collect(sharded, corpus, mesh=mesh)
    np.testing.assert_array_equal(alone.experts_NTk, cut.experts_NTk)


def test_analysis_and_its_report(model, corpus, tmp_path):
    routes = collect(model, corpus)
    other = collect(made(1), corpus)
    found = analyse(routes, earlier={"start": other, "end": routes})
    assert found["layers"] == [0, 1]
    assert found["saturation"]["end"]["k"] == [100, 100]
    assert found["saturation"]["start"]["k"][0] < 90
    for layer in ("0", "1"):
        assert found["coactivation"][layer]["adjacent"]["max"] > 0
        for values in found["domain_specialization"][layer].values():
            assert sum(values) == pytest.approx(200)
    assert sum(found["load"][0]["percent"]) == pytest.approx(600)
    assert len(saturation_table(found).rows) == 4
    page = Report("Routing", "test", sections(found, names={})).html()
    assert page.count("data:image/svg+xml") == 4
    for title in ("Router saturation", "Expert co-activation", "Domain specialisation"):
        assert title in page


def test_what_cannot_be_analysed_is_an_error(model, corpus):
    dense = made(0, dataclasses.replace(CONFIG, moe=None))
    with pytest.raises(UserError, match="is dense"):
        collect(dense, corpus)
    choosing = dataclasses.replace(CONFIG, moe=MoEConfig(6, 2, routing="expert_choice"))
    with pytest.raises(UserError, match="expert_choice"):
        collect(made(0, choosing), corpus)
    with pytest.raises(UserError, match="no layer 7"):
        analyse(collect(model, corpus), layers=[7])
