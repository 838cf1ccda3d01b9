import numpy as np
import pytest

from olmax.data import npy
from olmax.data.loader import DataLoader, LoaderOptions
from olmax.errors import UserError


def _files(tmp_path):
    arrays = [np.arange(1, 11), np.arange(100, 109), np.arange(200, 204)]
    paths = [tmp_path / f"part-{i}.npy" for i in range(3)]
    for path, array in zip(paths, arrays, strict=True):
        npy.write_tokens(path, [array[:4], array[4:]])
    return paths


def _source(paths, **options):
    options = {"name": "web", "sequence_length": 4, "eos_id": 0, **options}
    return npy.NpySource(paths, **options)


def test_files_are_raw_little_endian_uint32(tmp_path):
    path = tmp_path / "a.npy"
    assert npy.write_tokens(path, [np.array([1, 2]), np.array([100277])]) == 3
    assert path.read_bytes() == bytes([1, 0, 0, 0, 2, 0, 0, 0, 0xB5, 0x87, 1, 0])
    assert npy.open_tokens(path).tolist() == [1, 2, 100277]


def test_chunks_stay_inside_a_file_and_tails_are_dropped(tmp_path):
    source = _source(_files(tmp_path))
    assert len(source) == 2 + 2 + 1
    assert source.read([4, 0, 1, 2]).tolist() == [
        [200, 201, 202, 203], [1, 2, 3, 4], [5, 6, 7, 8], [100, 101, 102, 103],
    ]  # fmt: skip
    assert source.locate(3) == f"{tmp_path / 'part-1.npy'} chunk 1"


def test_the_loader_reads_them(tmp_path):
    source = _source(_files(tmp_path))
    loader = DataLoader([source], LoaderOptions(batch_size=5, seed=1, vocab_size=204))
    assert sorted(next(loader)["tokens"][:, 0].tolist()) == [1, 5, 100, 104, 200]
    loader.close()
    loader = DataLoader([source], LoaderOptions(batch_size=5, vocab_size=203))
    with pytest.raises(UserError, match=r"part-2\.npy chunk 0: token id 203 at position 3"):
        next(loader)
    loader.close()


def test_fingerprint_follows_content_and_length(tmp_path):
    paths = _files(tmp_path)
    first = _source(paths).fingerprint
    assert _source(paths).fingerprint == first
    assert _source(paths[::-1]).fingerprint != first
    assert _source(paths, sequence_length=2).fingerprint != first
    npy.write_tokens(paths[0], [np.arange(2, 12)])
    assert _source(paths).fingerprint != first


def test_export_gives_the_same_instances(tmp_path):
    source = _source(_files(tmp_path))
    assert npy.export_npy(source, tmp_path / "out" / "all.npy", batch=2) == 20
    again = _source([tmp_path / "out" / "all.npy"])
    np.testing.assert_array_equal(again.read(range(5)), source.read(range(5)))
    assert not list(tmp_path.rglob("*.partial*"))


def test_unusable_files(tmp_path):
    path = tmp_path / "a.npy"
    with pytest.raises(UserError, match="no such token file"):
        _source([path])
    path.write_bytes(b"")
    with pytest.raises(UserError, match="empty token file"):
        _source([path])
    path.write_bytes(b"\0" * 17)
    with pytest.raises(UserError, match="17 bytes is not a whole number of uint32"):
        _source([path])
    path.write_bytes(b"\0" * 12)
    with pytest.raises(UserError, match="3 tokens are less than one instance of 4"):
        _source([path])
    np.save(path, np.arange(10))
    with pytest.raises(UserError, match="has a numpy header"):
        _source([path])
    with pytest.raises(UserError, match="no token files"):
        _source([])


def test_interrupted_writing_leaves_nothing(tmp_path):
    def arrays():
        yield np.arange(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        npy.write_tokens(tmp_path / "a.npy", arrays())
    assert not list(tmp_path.iterdir())
