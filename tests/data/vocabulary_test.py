import numpy as np
import pytest

from olmax.data.tokenizer import train_bpe

tf = pytest.importorskip("tensorflow")

from olmax.data.vocabulary import TokenizerVocabulary  # noqa: E402  (imports tensorflow)

TEXTS = ["one two three\n", "日本語 four"]


@pytest.fixture(scope="module")
def vocabulary():
    return TokenizerVocabulary(train_bpe(TEXTS * 10, vocab_size=300))


def test_python_and_tensorflow_agree(vocabulary):
    for text in TEXTS:
        ids = vocabulary.encode(text)
        assert vocabulary.decode(ids) == text
        in_tf = vocabulary.encode_tf(tf.constant(text))
        assert in_tf.dtype == tf.int32
        np.testing.assert_array_equal(in_tf, ids)
        assert vocabulary.decode_tf(in_tf).numpy().decode() == text


def test_decode_tf_of_a_batch_stops_at_the_end_of_text(vocabulary):
    rows = [vocabulary.encode(text) for text in TEXTS]
    width = max(map(len, rows)) + 3
    batch = np.full((2, width), vocabulary.encode("one")[0], np.int32)
    for row, ids in zip(batch, rows, strict=True):
        row[: len(ids)] = ids
        row[len(ids)] = vocabulary.eos_id
    texts = [text.decode() for text in vocabulary.decode_tf(tf.constant(batch)).numpy()]
    assert texts == [text + "<|endoftext|>" for text in TEXTS]
    assert [vocabulary.decode(row) for row in batch.tolist()] == texts


def test_inside_a_tf_dataset(vocabulary):
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(vocabulary.encode_tf)
    assert dataset.element_spec.shape.as_list() == [None]
    rows = [row.tolist() for row in dataset.as_numpy_iterator()]
    assert rows == [vocabulary.encode(text) for text in TEXTS]


def test_equality_is_by_content(vocabulary, tmp_path):
    vocabulary.tokenizer.save(tmp_path)
    assert TokenizerVocabulary(tmp_path) == vocabulary
    assert TokenizerVocabulary(train_bpe(TEXTS, vocab_size=270)) != vocabulary
    assert vocabulary.vocab_size == vocabulary.tokenizer.vocab_size
