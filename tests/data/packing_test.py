import numpy as np
import pytest

from olmax.data import packing

EOS = 0


def _chunks(documents, length):
    return list(packing.chunk(documents, sequence_length=length, eos_id=EOS, dtype="uint16"))


def test_documents_straddle_chunks_and_the_tail_is_dropped():
    chunks = _chunks([[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]], 4)
    assert [c.tolist() for c in chunks] == [[1, 2, 3, 0], [4, 0, 5, 6], [7, 8, 9, 10]]
    assert chunks[0].dtype == np.uint16


def test_an_end_of_text_token_is_not_doubled_and_empty_documents_have_one():
    assert [c.tolist() for c in _chunks([[1, EOS], [], [2]], 5)] == [[1, 0, 0, 2, 0]]


def test_too_little_for_one_chunk():
    assert _chunks([[1, 2]], 4) == []


@pytest.mark.parametrize("length", [1, 3, 16])
def test_chunks_are_the_concatenation(length):
    rng = np.random.default_rng(length)
    documents = [rng.integers(1, 50, rng.integers(0, 40)).tolist() for _ in range(50)]
    flat = [token for document in documents for token in [*document, EOS]]
    expected = np.array(flat[: len(flat) // length * length]).reshape(-1, length)
    np.testing.assert_array_equal(np.stack(_chunks(documents, length)), expected)


def test_segments_and_positions():
    tokens = np.array([[1, 2, EOS, 3, EOS, EOS, 4], [EOS, 1, 1, 1, 1, 1, 1]])
    segments, positions = packing.document_segments(tokens, EOS)
    assert segments.tolist() == [[1, 1, 1, 2, 2, 3, 4], [1, 2, 2, 2, 2, 2, 2]]
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert segments.dtype == positions.dtype == np.int32


def test_document_spans():
    spans = packing.document_spans(np.array([1, 2, EOS, EOS, 3]), EOS)
    assert spans.tolist() == [[0, 3], [3, 4], [4, 5]]
    assert packing.document_spans(np.array([1, EOS]), EOS).tolist() == [[0, 2]]
    assert packing.document_spans(np.array([], np.int64), EOS).shape == (0, 2)
