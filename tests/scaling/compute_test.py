"""N and FLOPs per token of every published size."""

import pytest

from olmax.scaling.compute import SIZES, known_size

PUBLISHED = {
    "190M": (190_354_176, 1_903_391_232),
    "370M": (371_262_464, 3_443_922_944),
    "600M": (597_382_464, 5_180_751_744),
    "760M": (758_220_288, 6_373_843_968),
    "1.3B": (1_279_395_840, 10_109_071_360),
    "3.2B": (3_169_537_280, 22_970_355_200),
    "7B": (6_887_575_552, 49_412_071_424),
    "13B": (13_202_396_160, 91_335_915_520),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_counts_are_exact(size):
    shape = SIZES[size]
    assert (shape.parameters, shape.flops_per_token) == PUBLISHED[size]
    assert shape.total_parameters - shape.parameters == 100_352 * shape.d_model


def test_file_names_lead_to_sizes():
    assert known_size("1B") == ("1.3B", SIZES["1.3B"])
    assert known_size("peteish13") == ("13B", SIZES["13B"])
    assert known_size("60M") is None
