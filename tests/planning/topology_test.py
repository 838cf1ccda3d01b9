"""Names of slices, and what is refused before any compilation."""

import importlib.util

import pytest

from olmax.errors import UserError
from olmax.planning.topology import Topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'olmax[tpu]')",
)


def test_a_slice_by_name():
    topology = Topology.parse("v5p:4x4x8", slices=2)
    assert topology.name == "v5p:4x4x8"
    assert topology.num_chips == 256
    assert topology.hosts_per_slice == 32
    # Google counts the two cores of a v5p chip, and the one of a v6e chip.
    assert topology.accelerator_type == "v5p-256"
    assert Topology.parse("v6e:16x16").accelerator_type == "v6e-256"
    assert Topology.parse("v5e:4x4").accelerator_type == "v5litepod-16"


def test_the_shape_that_a_size_means():
    standard = "v5p:2x2x1 v5p:2x4x4 v5p:4x4x4 v5p:4x4x8 v5p:4x4x12 v5p:8x8x8 v6e:2x4 v6e:16x16"
    assert all(Topology.parse(name).standard for name in standard.split())
    odd = "v5p:4x4x16 v5p:2x2x16 v5e:2x8 v6e:4x64"
    assert not any(Topology.parse(name).standard for name in odd.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5p", "write chip and shape"),
        ("v5p:64", "write chip and shape"),
        ("v9:4x4", "no figures for TPU 'v9'"),
        ("v5p:4x4", "has 3 dimensions"),
        ("v6e:4x4x4", "has 2 dimensions"),
        ("v6e:0x4", "has 2 dimensions"),
        ("v6e:16x32", "at most 256 chips; join several"),
    ],
)
def test_bad_names_are_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        Topology.parse(text)
    assert "\n" not in str(caught.value)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"olmax\[tpu\]"):
        Topology.parse("v5p:2x2x2").devices()


@needs_libtpu
def test_a_slice_that_does_not_exist():
    with pytest.raises(UserError, match="no such TPU slice v6e:3x5"):
        Topology.parse("v6e:3x5").devices()


@needs_libtpu
def test_devices_lie_on_the_torus():
    devices = Topology.parse("v5p:2x2x2").devices()
    assert len(devices) == 8
    assert {tuple(device.coords) for device in devices} == {
        (x, y, z) for x in range(2) for y in range(2) for z in range(2)
    }
