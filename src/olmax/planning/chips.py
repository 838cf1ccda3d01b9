"""What is known of each TPU generation. Per device as jax counts devices.

Peaks, HBM bandwidth and core counts: jax's own TPU table (jax/_src/tpu_info.py). Link speeds: the
scaling book of Google DeepMind (jax-ml.github.io/scaling-book, "how to think about TPUs"). Prices:
Google Cloud's on-demand list prices in US regions, 2025; they change, and there are discounts.
"""

import dataclasses

from olmax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SplashRate:
    """Time of jax's splash attention kernel, fitted to published timings of it.

    The published series (specs of tokamax, 16,384 tokens, 16 heads of 128, lengths 1,024 to 16,384)
    is a straight line in the number of 512 x 512 tiles on or below the diagonal.
    """

    tile_seconds: float
    """One 512 x 512 tile of one head of width 128, forward."""
    backward: float
    """Backward tiles (dq and dkv together) over forward tiles."""
    measured: bool
    """False: scaled from another generation by the ideal matrix-unit cycles."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One generation."""

    name: str
    """As in a topology, `v5p`."""
    peak_flops: float
    """bfloat16 FLOP/s."""
    clock_hz: float
    """Cycles a second of the compiler's `estimated_cycles`."""
    hbm_bandwidth: float
    """Bytes a second."""
    hbm_bytes: int
    """What a program may use, as the compiler limits it."""
    link_bandwidth: float
    """Bytes a second of one interconnect link in one direction."""
    dimensions: int
    """Of the torus; every dimension has a link each way."""
    wrap: int
    """Smallest multiple of chips at which a dimension closes to a ring."""
    dcn_bandwidth: float
    """Bytes a second of a chip's share of its host's network, one way, between slices."""
    chips_per_host: int
    largest_slice: int
    """Chips of the largest slice that a job can get."""
    price_per_chip_hour: float
    """US dollars."""
    splash: SplashRate
    devices_per_chip: int = 1
    accelerator: str = ""
    """Name of the slice type at Google Cloud before the size, `v5litepod`."""
    cores_in_name: int = 1
    """What a chip counts in that size."""
    gke_accelerator: str = ""
    machine_type: str = ""
    """Of a GKE node with `chips_per_host` chips."""


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            peak_flops=197e12,
            clock_hz=1.5e9,
            hbm_bandwidth=820e9,
            hbm_bytes=int(15.75 * 2**30),
            link_bandwidth=45e9,
            dimensions=2,
            wrap=16,
            dcn_bandwidth=3.125e9,
            chips_per_host=4,
            largest_slice=256,
            price_per_chip_hour=1.20,
            splash=SplashRate(0.75e-6, 2.33, measured=False),
            accelerator="v5litepod",
            gke_accelerator="tpu-v5-lite-podslice",
            machine_type="ct5lp-hightpu-4t",
        ),
        Chip(
            name="v5p",
            peak_flops=459e12,
            clock_hz=1.75e9,
            hbm_bandwidth=2765e9,
            hbm_bytes=int(95.74 * 2**30),
            link_bandwidth=90e9,
            dimensions=3,
            wrap=4,
            dcn_bandwidth=6.25e9,
            chips_per_host=4,
            largest_slice=6144,
            price_per_chip_hour=4.20,
            splash=SplashRate(0.320e-6, 2.33, measured=True),
            accelerator="v5p",
            cores_in_name=2,
            gke_accelerator="tpu-v5p-slice",
            machine_type="ct5p-hightpu-4t",
        ),
        Chip(
            name="v6e",
            peak_flops=918e12,
            clock_hz=1.75e9,
            hbm_bandwidth=1640e9,
            hbm_bytes=int(31.25 * 2**30),
            link_bandwidth=90e9,
            dimensions=2,
            wrap=16,
            dcn_bandwidth=12.5e9,
            chips_per_host=4,
            largest_slice=256,
            price_per_chip_hour=2.70,
            splash=SplashRate(0.391e-6, 2.33, measured=True),
            accelerator="v6e",
            gke_accelerator="tpu-v6e-slice",
            machine_type="ct6e-standard-4t",
        ),
    )
}


def find(name: str) -> Chip:
    """The chip called `name`.

    Raises:
      UserError: the plan has no figures for it.
    """
    if name not in CHIPS:
        raise UserError(f"no figures for TPU {name!r}; plans exist for {', '.join(CHIPS)}")
    return CHIPS[name]
