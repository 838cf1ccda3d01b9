import numpy as np
import pytest

from olmax.data.repetition import RepetitionFilter


def _brute_force(tokens, min_period, max_period, max_count):
    """Every start, every period: does the n-gram there occur `max_count` times in a row?"""
    tokens = list(tokens)
    for period in range(min_period, max_period + 1):
        for start in range(len(tokens) - period * max_count + 1):
            gram = tokens[start : start + period]
            if all(
                tokens[start + k * period : start + (k + 1) * period] == gram
                for k in range(max_count)
            ):
                return True
    return False


def _instance(rng, period, times, length=512, start=0):
    """Distinct tokens except for an n-gram of distinct tokens, repeated."""
    tokens = np.arange(1000, 1000 + length)
    gram = rng.permutation(900)[:period]
    tokens[start : start + period * times] = np.tile(gram, times)
    return tokens


@pytest.mark.parametrize("period", range(1, 14))
@pytest.mark.parametrize("start", [0, 1, 5, 17])
def test_thirty_two_repetitions_are_found_and_thirty_one_are_not(period, start):
    rng = np.random.default_rng(period)
    rows = np.stack(
        [_instance(rng, period, 32, start=start), _instance(rng, period, 31, start=start)]
    )
    assert RepetitionFilter().repeats(rows).tolist() == [True, False]


def test_one_partial_repetition_more_does_not_count():
    rng = np.random.default_rng(0)
    tokens = _instance(rng, 5, 31, start=3)
    tokens[3 + 155 : 3 + 155 + 4] = tokens[3:7]  # 31 times and four of the five tokens
    assert not RepetitionFilter().repeats(tokens[None])[0]
    tokens[3 + 155 + 4] = tokens[7]
    assert RepetitionFilter().repeats(tokens[None])[0]


def test_period_fourteen_is_kept():
    rng = np.random.default_rng(1)
    assert not RepetitionFilter().repeats(_instance(rng, 14, 36)[None])[0]


def test_at_the_end_of_the_instance():
    rng = np.random.default_rng(2)
    tokens = _instance(rng, 3, 32, start=512 - 96)
    assert RepetitionFilter().repeats(tokens[None])[0]


def test_one_token_throughout_and_instances_that_are_too_short():
    assert RepetitionFilter().repeats(np.full((1, 32), 7))[0]
    assert not RepetitionFilter().repeats(np.full((1, 31), 7))[0]
    assert not RepetitionFilter().repeats(np.full((1, 1), 7))[0]


@pytest.mark.parametrize("alphabet", [1, 2, 3])
def test_against_brute_force(alphabet):
    rng = np.random.default_rng(alphabet)
    for count in (2, 3, 4, 5):
        rows = rng.integers(0, alphabet, (60, 24)).astype(np.uint16)
        found = RepetitionFilter(1, 4, count).repeats(rows)
        expected = [_brute_force(row, 1, 4, count) for row in rows]
        assert found.tolist() == expected
        if alphabet > 1 and count in (4, 5):
            assert 0 < sum(expected) < len(rows)  # the comparison says something


def test_shortest_period():
    rows = np.array([[1] * 8, [1, 2] * 4])
    assert RepetitionFilter(2, 3, 4).repeats(rows).tolist() == [True, True]
    assert RepetitionFilter(1, 1, 4).repeats(rows).tolist() == [True, False]


def test_impossible_settings():
    with pytest.raises(ValueError, match="no such"):
        RepetitionFilter(3, 2)
