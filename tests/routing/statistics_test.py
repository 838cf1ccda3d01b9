"""Definitions of the routing analysis, on small cases and on the published counts."""

import csv

import numpy as np
import pytest

from olmax.routing import (
    coactivation,
    domain_specialization,
    expert_load,
    saturation,
    vocabulary_specialization,
)
from olmax.routing.analysis import domain_summary
from olmax.routing.statistics import busiest_pairs, expert_counts

# Specs/olmoe.md section 4, from the counts: (max, expert, std) of layers 0, 7 and 15.
PUBLISHED = {
    "arxiv": [(97.7, 0, 11.9), (78.5, 17, 16.0), (93.7, 17, 15.6)],
    "github": [(62.6, 21, 8.3), (77.0, 17, 16.9), (56.4, 30, 14.9)],
    "wikipedia": [(77.2, 11, 11.2), (84.8, 27, 12.8), (58.1, 36, 16.3)],
    "book": [(45.4, 28, 7.0), (50.7, 28, 10.5), (36.6, 45, 9.7)],
    "c4": [(37.7, 41, 4.1), (33.2, 1, 5.0), (31.2, 7, 6.4)],
}
ABOVE = {"arxiv": 8, "github": 9, "wikipedia": 12, "book": 7, "c4": 3}
TULU = {
    "olmoe": [(40.4, 21), (55.6, 17), (51.7, 30)],
    "olmoe-sft": [(36.9, 21), (49.6, 17), (44.0, 30)],
    "olmoe-dpo": [(36.5, 21), (49.6, 17), (43.7, 30)],
}
MIXTRAL = {"arxiv": (31.7, 28.3, 29.3), "github": (32.4, 31.1, 33.2), "c4": (28.0, 26.9, 28.1)}


@pytest.fixture(scope="module")
def counts(data_dir):
    path = data_dir / "olmoe_routing" / "expert_counts.csv"
    if not path.exists():
        pytest.skip(f"no published counts at {path}")
    found = {}
    with path.open() as stream:
        for row in csv.DictReader(stream):
            key = (row["model"], row["selection"], row["domain"], int(row["layer"]))
            found.setdefault(key, []).append(int(row["count"]))
    return found


@pytest.mark.parametrize("domain", PUBLISHED)
def test_published_domain_specialization(counts, domain):
    for layer, (highest, expert, std) in zip((0, 7, 15), PUBLISHED[domain], strict=True):
        found = domain_summary(counts["olmoe", "top8", domain, layer], 8)
        assert found["expert"] == expert
        assert round(found["max"], 1) == highest and round(found["std"], 1) == std
    assert found["above_twice_uniform"] == ABOVE[domain]


@pytest.mark.parametrize("model", TULU)
def test_published_specialization_on_instructions(counts, model):
    for layer, (highest, expert) in zip((0, 7, 15), TULU[model], strict=True):
        found = domain_summary(counts[model, "top8", "tulu", layer], 8)
        assert (round(found["max"], 1), found["expert"]) == (highest, expert)


@pytest.mark.parametrize("domain", MIXTRAL)
def test_published_specialization_of_mixtral(counts, domain):
    for layer, highest in zip((0, 7, 15), MIXTRAL[domain], strict=True):
        found = domain_summary(counts["mistral", "top2", domain, layer], 2)
        assert round(found["max"], 1) == highest
    assert found["above_twice_uniform"] == 0


def test_a_checkpoint_is_saturated_with_respect_to_itself():
    experts = np.array([[3, 1, 2], [0, 1, 3]])
    assert saturation(experts, experts) == 100
    # The order does not matter for k, and does for the most likely one.
    assert saturation(experts[:, ::-1], experts) == 100
    assert saturation(experts[:, ::-1], experts, 1) == 0
    assert saturation(np.array([[3, 0, 5], [0, 4, 5]]), experts) == pytest.approx(100 / 3)


def test_random_routers_agree_on_k_of_e():
    rng = np.random.default_rng(0)
    a, b = (np.argsort(rng.random((20_000, 16)), axis=1)[:, :4] for _ in range(2))
    assert saturation(a, b) == pytest.approx(100 * 4 / 16, abs=0.5)
    assert saturation(a, b, 1) == pytest.approx(100 / 16, abs=0.6)


def test_coactivation_counts_all_or_adjacent_pairs():
    experts = np.array([[0, 1, 2], [0, 2, 3], [1, 0, 3]])
    every, adjacent = (coactivation(experts, 4, pairs=kind) for kind in ("all", "adjacent"))
    # Expert 0 is in all three tokens: with 1 in two of them, with 2 in two.
    np.testing.assert_allclose(every[0], [0, 200 / 3, 200 / 3, 200 / 3])
    np.testing.assert_allclose(every[1], [100, 0, 50, 50])
    # In the first token 0 and 2 are not neighbours; in the second 0 and 3, in the third 1 and 3.
    np.testing.assert_allclose(adjacent[0], [0, 200 / 3, 100 / 3, 100 / 3])
    assert (adjacent <= every).all() and not np.diag(every).any()
    # Every token with a has k - 1 others, of which at most two are neighbours.
    np.testing.assert_allclose(every.sum(axis=1), 200)
    assert busiest_pairs(every, 2) == [1, 0]


def test_domain_specialization_sums_to_k():
    counts = expert_counts(np.array([[0, 2], [1, 2], [0, 1], [2, 0]]), 5)
    found = domain_specialization(counts, 2)
    assert found.sum() == pytest.approx(200) and found[3] == 0
    np.testing.assert_allclose(found[:3], [75, 50, 75])
    np.testing.assert_allclose(expert_load(counts), [187.5, 125, 187.5, 0, 0])


def test_vocabulary_specialization_by_hand():
    ids = np.array([7, 7, 7, 9, 5, -1])
    experts = np.array([[0, 1], [0, 2], [1, 0], [2, 1], [1, 2], [3, 2]])
    found = vocabulary_specialization(experts, ids, 4, least=3)
    # 7 goes to expert 0 in two of three; 9 and 5, seen once, count whole; -1 is nobody.
    assert found.mean == pytest.approx((200 / 3 + 100 + 100) / 3)
    np.testing.assert_allclose(found.by_expert, [200 / 3, 100, 100, np.nan])
    assert found.favourites[0] == [(7, pytest.approx(200 / 3), 3)] and found.favourites[1] == []
    # Among the two most likely, expert 0 has 7 every time.
    assert vocabulary_specialization(experts, ids, 4, k=2).by_expert[0] == 100


def test_different_tokens_cannot_be_compared():
    with pytest.raises(ValueError, match="the same tokens"):
        saturation(np.zeros((2, 3)), np.zeros((3, 3)))
