"""What counts as a checkpoint, which stay, damage, full disks, other meshes."""

import dataclasses
import functools
import json
import resource
import shutil

import jax
import numpy as np
import pytest

from olmax import sharding
from olmax.errors import UserError
from olmax.models import Execution
from olmax.training import checkpoint_files
from olmax.training.checkpoints import Checkpointer, read_arrays, restore_model
from olmax.training.checksums import checksums
from olmax.training.config import CheckpointConfig
from olmax.training.names import named_leaves
from olmax.training.trainer import train_step
from tests.training.tiny_training import CONFIG, MODEL, CountingLoader, one_device, trainer


@functools.cache
def steps():
    return train_step(CONFIG, one_device())


@pytest.fixture
def state():
    return steps().initialize()


def save(checkpointer, state, step, permanent=True):
    checkpointer.save(state, step, config=CONFIG, loader={"position": step}, permanent=permanent)
    checkpointer.wait()


def names(root):
    return [path.name for path in checkpoint_files.valid_checkpoints(root)]


@pytest.fixture
def checkpointer(tmp_path):
    made = Checkpointer(tmp_path / "checkpoints", CheckpointConfig())
    yield made
    made.close()


def test_what_is_due():
    checkpointer = Checkpointer("unused", CheckpointConfig(interval=10, ephemeral_interval=4))
    due = {step: checkpointer.due(step) for step in range(1, 21)}
    assert {s for s, kind in due.items() if kind == "permanent"} == {10, 20}
    assert {s for s, kind in due.items() if kind == "ephemeral"} == {4, 8, 12, 16}


def test_state_and_loader_come_back_bit_for_bit(checkpointer, state):
    expected = {name: np.asarray(x) for name, x in named_leaves(state).items()}
    save(checkpointer, state, 5)
    restored, loader = checkpointer.restore_newest(steps().abstract_state)
    assert loader == {"position": 5}
    for name, value in named_leaves(restored).items():
        np.testing.assert_array_equal(np.asarray(value), expected[name])


def test_relative_directories_are_as_good_and_remote_ones_stay(tmp_path, state, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpointer = Checkpointer("run/checkpoints", CheckpointConfig())
    save(checkpointer, state, 5)
    (found,) = checkpoint_files.candidates("run")
    name = "params.final_norm.scale"
    arrays = read_arrays(found, {name: named_leaves(steps().abstract_state)[name]})
    np.testing.assert_array_equal(arrays[name], named_leaves(state)[name])
    checkpointer.close()
    remote = checkpoint_files.epath.Path("gs://bucket/run")
    assert checkpoint_files.absolute(remote) == remote


def test_ephemeral_ones_are_replaced_and_permanent_ones_limited(tmp_path, state):
    root = tmp_path / "checkpoints"
    checkpointer = Checkpointer(root, CheckpointConfig(max_to_keep=2))
    seen = []
    for step, permanent in [(1, 0), (2, 1), (3, 0), (4, 0), (5, 1), (6, 0), (7, 1)]:
        save(checkpointer, state, step, permanent=bool(permanent))
        seen.append(names(checkpointer.root))
    assert seen == [["1"], ["2"], ["2", "3"], ["2", "4"], ["2", "5"], ["2", "5", "6"], ["5", "7"]]
    checkpointer.close()


def test_without_metadata_it_is_no_checkpoint_and_is_cleaned(checkpointer, state):
    save(checkpointer, state, 1)
    save(checkpointer, state, 2)
    (checkpointer.root / "2" / "metadata.json").unlink()
    assert names(checkpointer.root) == ["1"]
    with pytest.raises(UserError, match="2 is an incomplete checkpoint"):
        restore_model(checkpointer.root / "2")
    checkpointer.clean()
    assert not (checkpointer.root / "2").exists()


def test_metadata_is_written_last_and_removed_first(checkpointer, state, monkeypatch):
    order = []
    write = checkpoint_files.write_metadata

    def watched(directory, metadata):
        order.append(sorted(path.name for path in directory.iterdir()))
        write(directory, metadata)

    monkeypatch.setattr(checkpoint_files, "write_metadata", watched)
    save(checkpointer, state, 1)
    assert order == [["config.json", "loader.json", "state"]]

    def interrupted(self, missing_ok=False):
        raise KeyboardInterrupt

    directory = checkpointer.root / "1"
    monkeypatch.setattr(type(directory), "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_files.remove(directory)
    assert names(checkpointer.root) == []


def largest_array_file(directory):
    found = [path for path in (directory / "state").glob("ocdbt.process_*/d/*") if path.is_file()]
    return max(found, key=lambda path: path.stat().length)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().length // 2])


def flip_bits(path):
    data = bytearray(path.read_bytes())
    for position in range(len(data) // 3, len(data), max(1, len(data) // 7)):
        data[position] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "array data cut short": lambda d: truncate(largest_array_file(d)),
    "array data flipped": lambda d: flip_bits(largest_array_file(d)),
    "array data missing": lambda d: largest_array_file(d).unlink(),
    "arrays missing": lambda d: (d / "state").rmtree(),
    "manifest missing": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
    "manifest cut short": lambda d: truncate(d / "state" / "manifest.ocdbt"),
    "orbax metadata cut short": lambda d: truncate(d / "state" / "_METADATA"),
    "metadata cut short": lambda d: truncate(d / "metadata.json"),
    "metadata empty": lambda d: (d / "metadata.json").write_text("{}"),
    "loader state cut short": lambda d: truncate(d / "loader.json"),
    "loader state missing": lambda d: (d / "loader.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_reported_and_the_previous_used(damage, checkpointer, state, capfd):
    save(checkpointer, state, 1)
    save(checkpointer, dataclasses.replace(state, step=state.step + 2), 2)
    DAMAGE[damage](checkpointer.root / "2")
    restored, loader = checkpointer.restore_newest(steps().abstract_state)
    assert int(restored.step) == 0 and loader == {"position": 1}
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert f"checkpoint {checkpointer.root / '2'} is damaged (" in lines[0]
    assert "using the previous one" in lines[0]
    assert names(checkpointer.root) == ["1"]
    assert (checkpointer.root / "2.damaged").exists()


def test_all_damaged_is_an_error_not_a_fresh_start(checkpointer, state):
    save(checkpointer, state, 1)
    truncate(checkpointer.root / "1" / "metadata.json")
    with pytest.raises(UserError, match="all 1 checkpoints"):
        checkpointer.restore_newest(steps().abstract_state)


def test_a_single_changed_bit_changes_the_checksum():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.int32, np.uint32, jax.numpy.bfloat16, np.uint8, bool):
        x = (rng.normal(size=(7, 33)) * 50).astype(dtype)
        before = int(checksums({"x": x})["x"])
        for _ in range(20):
            y = x.copy()
            raw = y.reshape(-1).view(np.uint8)
            position = rng.integers(raw.size)
            raw[position] ^= 1 if dtype is bool else 1 << rng.integers(8)
            assert int(checksums({"x": y})["x"]) != before
        # Of bools there are too few kinds for a swap to be sure to show.
        assert dtype is bool or int(checksums({"x": x[::-1]})["x"]) != before


def test_checksums_do_not_depend_on_the_mesh():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    spec = jax.sharding.PartitionSpec("fsdp", "tensor")
    cut = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    assert int(checksums({"x": cut})["x"]) == int(checksums({"x": x})["x"])


class SmallFiles:
    """No file may grow beyond `size` bytes: what a full disk looks like to a writer."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


# One array alone (131 kB) is larger than the limit: small ones may be spread over several files.
WIDE = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, d_ff=512))


@pytest.mark.parametrize("size", [60_000, 1000], ids=["arrays", "config"])
def test_a_full_disk_is_one_line_and_loses_nothing(checkpointer, size, capfd):
    step = train_step(WIDE, one_device())
    state = step.initialize()
    save(checkpointer, state, 1, permanent=False)
    with SmallFiles(size), pytest.raises(UserError) as error:
        save(checkpointer, state, 2)
    message = str(error.value)
    assert "checkpoint of step 2" in message and "file too large" in message.lower()
    assert f"the newest complete one is {checkpointer.root / '1'}" in message
    assert "\n" not in message and "Traceback" not in capfd.readouterr().err
    assert [path.name for path in checkpointer.root.iterdir()] == ["1"]
    restored, _ = checkpointer.restore_newest(step.abstract_state)
    assert int(restored.step) == 0
    save(checkpointer, state, 2)
    assert names(checkpointer.root) == ["2"]


def test_a_full_disk_ends_training_with_the_same_error(tmp_path):
    config = dataclasses.replace(WIDE, steps=6)
    with SmallFiles(60_000), pytest.raises(UserError, match="could not be written"):
        trainer(tmp_path, config).fit()
    assert trainer(tmp_path, config).fit().step == 6


def test_another_mesh_gets_the_same_values(checkpointer, state):
    expected = {name: np.asarray(x) for name, x in named_leaves(state).items()}
    save(checkpointer, state, 3)
    for spec in ("fsdp=8", "fsdp=2,tensor=2,data=2"):
        abstract = train_step(CONFIG, sharding.make_mesh(spec)).abstract_state
        restored, _ = checkpointer.restore_newest(abstract)
        for name, value in named_leaves(restored).items():
            np.testing.assert_array_equal(np.asarray(value), expected[name])
            assert value.sharding == named_leaves(abstract)[name].sharding


def test_another_model_or_optimizer_is_an_error_naming_the_array(checkpointer, state):
    save(checkpointer, state, 1)
    wider = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, d_ff=64))
    with pytest.raises(UserError, match=r"mlp\.\w+ is float32\[2, .*, expected float32\["):
        checkpointer.restore_newest(train_step(wider, one_device()).abstract_state)
    with pytest.raises(UserError, match=r"has no params\.extra"):
        read_arrays(checkpointer.root / "1", {"params.extra": jax.ShapeDtypeStruct((), "float32")})
    assert names(checkpointer.root) == ["1"]


def test_a_model_is_restored_from_run_checkpoints_or_step(tmp_path, capfd):
    run = tmp_path / "run"
    expected = trainer(run, dataclasses.replace(CONFIG, steps=6)).fit().model
    tokens = next(iter(CountingLoader(CONFIG)))["tokens"]
    logits = np.asarray(expected(tokens))
    for path in (run, run / "checkpoints", run / "checkpoints" / "6"):
        model = restore_model(str(path), execution=Execution())
        np.testing.assert_array_equal(np.asarray(model(tokens)), logits)
        assert model.config == MODEL
    half = restore_model(str(run), execution=Execution(param_dtype="bfloat16"))
    assert half.head.kernel[...].dtype == "bfloat16"
    mesh = sharding.make_mesh("fsdp=4,tensor=2")
    cut = restore_model(str(run), execution=Execution(), mesh=mesh)
    np.testing.assert_array_equal(np.asarray(cut.head.kernel[...]), expected.head.kernel[...])
    assert cut.head.kernel[...].sharding.mesh == mesh
    shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "9")
    truncate(checkpoint_files.epath.Path(run / "checkpoints" / "9" / "metadata.json"))
    restore_model(str(run), execution=Execution())
    assert "using the previous one" in capfd.readouterr().err
    assert (run / "checkpoints" / "9").exists()
    with pytest.raises(UserError, match="can be read"):
        restore_model(str(run / "checkpoints" / "9"), execution=Execution())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "olmo2"}')
    for path in (tmp_path / "nothing", tmp_path / "other"):
        with pytest.raises(UserError, match="no checkpoint at"):
            restore_model(str(path), execution=Execution())


def test_config_is_inside(checkpointer, state):
    save(checkpointer, state, 1)
    stored = json.loads((checkpointer.root / "1" / "config.json").read_text())
    assert stored["model"]["d_model"] == MODEL.d_model
