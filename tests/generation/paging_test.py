"""Pages are disjoint on every device and enough for a row; prompts are grouped by length."""

import numpy as np
import pytest

from olmax.generation.paging import PAGE, page_table, prompt_groups


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_every_row_has_pages_of_its_own_on_its_device(shards):
    tokens = [1, PAGE, PAGE + 1, 5 * PAGE, 0, 3, 2 * PAGE, 0]
    table, pages = page_table(tokens, shards)
    assert pages % shards == 0
    rows = len(tokens) // shards
    for start in range(0, len(tokens), rows):
        part = table[start : start + rows]
        owned = part[part < pages]
        assert len(owned) == len(set(owned.tolist())) and owned.max(initial=0) < pages // shards
    np.testing.assert_array_equal((table < pages).sum(axis=1), -(-np.array(tokens) // PAGE))
    first = (table < pages).astype(int)
    assert (np.diff(first, axis=1) <= 0).all()


def test_short_prompts_are_read_apart_where_that_spares_much():
    assert prompt_groups([10, 20, 15]) == [[1, 2, 0]]
    assert prompt_groups([50] * 31 + [1500])[0] == [31]
    assert len(prompt_groups([50] * 31 + [1500])) == 2
    # One short prompt beside a long one is not worth a program of its own.
    assert prompt_groups([512, 200]) == [[0, 1]]
    groups = prompt_groups(list(range(1, 2000, 7)))
    assert sorted(row for group in groups for row in group) == list(range(286))
