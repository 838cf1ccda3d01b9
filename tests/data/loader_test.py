import collections
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from olmax.data.loader import DataLoader, LoaderOptions
from olmax.data.repetition import RepetitionFilter
from olmax.errors import UserError

LENGTH = 8


class _Rows:
    """Instances in memory: row i holds i throughout, so that a batch tells what was read."""

    def __init__(self, name, count, start=0, eos_id=0, fingerprint="1"):
        self.name = name
        self.sequence_length = LENGTH
        self.eos_id = eos_id
        self.fingerprint = fingerprint
        self._tokens = np.arange(start, start + count, dtype=np.uint16)[:, None] * np.ones(
            LENGTH, np.uint16
        )

    def __len__(self):
        return len(self._tokens)

    def read(self, indices):
        return self._tokens[list(indices)]

    def locate(self, index):
        return f"{self.name}.array_record record {index}"


A, B = _Rows("a", 23), _Rows("b", 14, start=1000)


def _loader(sources=(A, B), **options):
    options = {"batch_size": 4, "seed": 3, **options}
    return DataLoader(sources, LoaderOptions(**options))


def _ids(loader, batches):
    with loader:
        return [next(loader)["tokens"][:, 0].tolist() for _ in range(batches)]


def _joined(hosts):
    """The global batches whose rows the hosts hold."""
    return [list(itertools.chain(*rows)) for rows in zip(*hosts, strict=True)]


def test_an_epoch_has_every_instance_once_and_the_next_is_another_order():
    ids = list(itertools.chain(*_ids(_loader(batch_size=1), 74)))
    everything = sorted([*range(23), *range(1000, 1014)])
    assert sorted(ids[:37]) == sorted(ids[37:]) == everything
    assert ids[:37] != ids[37:]
    assert ids[:37] != everything
    # Shuffled across sources, not one after the other.
    assert len({i >= 1000 for i in ids[:12]}) == 2


def test_order_is_a_function_of_the_seed():
    first = _ids(_loader(), 20)
    assert _ids(_loader(prefetch=0), 20) == first
    assert _ids(_loader(seed=4), 20) != first
    # A neighbouring seed must not give the next epoch of this one.
    flat = list(itertools.chain(*_ids(_loader(batch_size=37), 2)))
    assert _ids(_loader(batch_size=37, seed=4), 1)[0] != flat[37:]


def test_without_shuffling_the_order_is_that_of_the_files():
    ids = list(itertools.chain(*_ids(_loader(batch_size=37, shuffle=False), 1)))
    assert ids == [*range(23), *range(1000, 1014)]


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("weights", [None, {"a": 1, "b": 2}])
def test_hosts_share_each_batch(hosts, weights):
    whole = _ids(_loader(weights=weights), 15)
    parts = [
        _ids(_loader(weights=weights, host_index=h, host_count=hosts), 15) for h in range(hosts)
    ]
    assert _joined(parts) == whole


@pytest.mark.parametrize("step", [0, 1, 7, 19])
@pytest.mark.parametrize("weights", [None, {"a": 1, "b": 2}])
def test_resume_at_any_step_on_another_number_of_hosts(step, weights):
    whole = _ids(_loader(weights=weights), 25)
    first = _loader(weights=weights, host_index=1, host_count=2)
    for _ in range(step):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    parts = []
    for host in range(4):
        resumed = _loader(weights=weights, host_index=host, host_count=4)
        next(resumed)  # what was read before does not matter
        resumed.set_state(state)
        assert resumed.examples == 4 * step
        parts.append(_ids(resumed, 25 - step))
    assert _joined(parts) == whole[step:]


def test_state_does_not_count_what_was_only_read_ahead():
    with _loader(prefetch=8) as loader:
        next(loader)
        assert loader.get_state()["examples"] == 4


@pytest.mark.parametrize("factor", [2, 4])
def test_batch_size_may_change_by_a_factor(factor):
    flat = list(itertools.chain(*_ids(_loader(), 24)))
    loader = _loader()
    for _ in range(8):
        next(loader)
    larger = _loader(batch_size=4 * factor)
    larger.set_state(loader.get_state())
    loader.close()
    assert list(itertools.chain(*_ids(larger, 16 // factor))) == flat[32:96]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sources": (A, _Rows("b", 14, start=1000, fingerprint="2"))}, "saved with data"),
        ({"sources": (A,)}, "saved with data"),
        ({"seed": 5}, "saved with seed 3, now 5"),
        ({"weights": {"a": 1, "b": 1}}, "other weights"),
        ({"shuffle": False}, "other weights or shuffling"),
    ],
)
def test_state_of_another_order_is_refused(changed, message):
    loader = _loader()
    next(loader)
    state = loader.get_state()
    loader.close()
    other = _loader(**changed)
    with pytest.raises(UserError, match=message):
        other.set_state(state)
    assert other.examples == 0
    other.set_state(state, allow_changed_data=True)
    assert other.examples == 4


def test_what_is_no_state_is_refused():
    with pytest.raises(UserError, match="not a state"):
        _loader().set_state({"step": 3})
    with pytest.raises(UserError, match="version 9"):
        _loader().set_state(_loader().get_state() | {"version": 9})


def test_weights_hold_over_any_stretch_and_sources_repeat_reshuffled():
    loader = _loader(weights={"a": 3, "b": 1}, batch_size=16)
    with loader:
        batches = [next(loader) for _ in range(12)]
    source = np.concatenate([b["source"] for b in batches])
    assert loader.source_names == ["a", "b"]
    for start in range(0, len(source), 16):
        assert abs((source[start : start + 16] == 0).sum() - 12) <= 1
    ids = np.concatenate([b["tokens"][:, 0] for b in batches])
    from_a = ids[source == 0].tolist()
    assert len(from_a) == 144
    epochs = [from_a[i : i + 23] for i in range(0, 138, 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert collections.Counter((ids >= 1000).tolist()) == {False: 144, True: 48}


def test_one_pass_ends_and_its_last_batch_is_filled_up():
    for hosts in (1, 2):
        seen = []
        for host in range(hosts):
            with _loader(batch_size=8, epochs=1, host_index=host, host_count=hosts) as loader:
                batches = list(loader)
            assert len(batches) == 5
            assert all(b["tokens"].shape == (8 // hosts, LENGTH) for b in batches)
            for batch in batches:
                real = batch["loss_mask"].any(axis=1)
                seen += batch["tokens"][real, 0].tolist()
            with pytest.raises(StopIteration):
                next(loader)
            loader.close()
        assert sorted(seen) == [*range(23), *range(1000, 1014)]


def test_batch_types():
    with _loader(document_masking=True) as loader:
        batch = next(loader)
    types = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert types == {
        "tokens": ("int32", (4, LENGTH)),
        "loss_mask": ("bool", (4, LENGTH)),
        "source": ("int32", (4,)),
        "segment_ids": ("int32", (4, LENGTH)),
        "positions": ("int32", (4, LENGTH)),
    }


def test_document_masking_marks_documents():
    source = _Rows("a", 2)
    source._tokens = np.array([[5, 6, 0, 7, 7, 7, 0, 1]], np.uint16)
    with _loader([source], batch_size=1, document_masking=True) as loader:
        batch = next(loader)
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 3]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0]]
    with _loader([source], batch_size=1) as loader:
        assert set(next(loader)) == {"tokens", "loss_mask", "source"}


def test_repetitions_take_no_part_in_the_loss():
    source = _Rows("a", 2)
    source._tokens = np.array([[1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6, 7, 8]], np.uint16)
    repetition = RepetitionFilter(1, 2, 4)
    with _loader([source], batch_size=2, shuffle=False, repetition_filter=repetition) as loader:
        assert next(loader)["loss_mask"].tolist() == [[False] * LENGTH, [True] * LENGTH]
    with _loader([source], batch_size=2, repetition_filter=None) as loader:
        assert next(loader)["loss_mask"].all()


def test_token_out_of_range_names_shard_and_record_and_stays_an_error():
    with _loader(shuffle=False, batch_size=8, vocab_size=1010) as loader:
        next(loader)
        next(loader)
        next(loader)
        next(loader)
        for _ in range(2):  # the failed batch is not skipped by asking again
            with pytest.raises(
                UserError, match=r"b\.array_record record 10: token id 1010 at position 0"
            ):
                next(loader)
        assert loader.examples == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "no data sources"),
        ({"sources": (A, A)}, "different names"),
        ({"batch_size": 6, "host_count": 4}, "6 cannot be shared by 4 hosts"),
        ({"batch_size": 0}, "give a multiple"),
        ({"host_index": 2, "host_count": 2}, "host index 2"),
        ({"weights": {"a": 1, "c": 1}}, "weights name 'c'"),
        ({"weights": {"a": 1}}, "source 'b' has no positive weight"),
        ({"weights": {"a": 1, "b": 0}}, "source 'b' has no positive weight"),
        ({"weights": {"a": 1, "b": 1}, "epochs": 1}, "epochs are not defined"),
        (
            {"sources": (A, _Rows("c", 3, eos_id=1)), "document_masking": True},
            "end-of-text",
        ),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(UserError, match=message):
        _loader(**options)


def test_different_sequence_lengths_are_refused():
    other = _Rows("c", 3)
    other.sequence_length = 4
    with pytest.raises(UserError, match=r"differ in sequence length \(a 8, c 4\)"):
        _loader((A, other))


def test_training_from_prepared_data_needs_no_tensorflow():
    script = (
        "import sys\n"
        "from olmax.data import corpus, loader, mixtures, npy, prepared, sources, tokenizer\n"
        "heavy = {'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
