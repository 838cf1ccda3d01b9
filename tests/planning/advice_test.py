"""Verdicts."""

from olmax.planning import advice
from olmax.planning.topology import Topology

GIB = 2**30
V6E = Topology.parse("v6e:4x4")


def verdict(total, state, **kwargs):
    settings = dict(fits=False, topology=V6E, accumulation=1, batch_per_shard=4) | kwargs
    return advice.verdict(int(total * GIB), int(state * GIB), **settings)


def test_what_fits_says_how_much_it_takes():
    assert verdict(12.34, 5, fits=True) == "fits: 12.3 of 31.2 GiB a device"


def test_too_big_says_by_how_much_and_what_would_fit():
    text = verdict(40, 10)
    assert "over by 8.8 GiB" in text
    assert "--accumulation 2" in text
    assert "--topology v6e:4x8" in text


def test_micro_batches_are_no_advice_when_the_state_alone_is_too_big():
    text = verdict(80, 60)
    assert "--accumulation" not in text
    assert "--topology v6e:8x8" in text


def test_micro_batches_are_no_advice_without_sequences_to_cut():
    assert "--accumulation" not in verdict(40, 10, batch_per_shard=1)
