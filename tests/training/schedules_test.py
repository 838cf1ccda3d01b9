"""The spec's golden learning rates, and the same values inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmax.errors import UserError
from olmax.training.schedules import ScheduleConfig, learning_rate

BATCH_7B = 1024 * 4096
BATCH_1B = 512 * 4096
BATCH_13B = 2048 * 4096


def cosine(peak, warmup, duration, units="tokens"):
    return ScheduleConfig("cosine", peak, warmup, duration, final_fraction=0.1, units=units)


PUBLISHED = {
    "7B": (cosine(3e-4, 8_388_608_000, 5e12), BATCH_7B),
    "1B": (cosine(4e-4, 8_388_608_000, 5e12), BATCH_1B),
    "13B": (cosine(9e-4, 8_388_608_000, 5e12), BATCH_13B),
    "32B": (cosine(6e-4, 2000, -(-6_500_000_000_000 // BATCH_13B), "steps"), BATCH_13B),
}


@pytest.mark.parametrize(
    "name, step, expected, digits",
    [
        ("7B", 928_000, 6.14988e-5, 6),
        ("7B", 928_646, 6.13511e-5, 6),
        ("1B", 1_907_359, 7.44873e-5, 6),
        ("13B", 596_057, 9.0000e-5, 5),
        ("32B", 721_901, 6.6232e-5, 5),
    ],
)
def test_published_rates_at_the_end_of_stage_one(name, step, expected, digits):
    schedule, tokens_per_step = PUBLISHED[name]
    rate = float(learning_rate(schedule, step, tokens_per_step))
    assert f"{rate:.{digits - 1}e}" == f"{expected:.{digits - 1}e}"


@pytest.mark.parametrize("name, steps", [("7B", 2000), ("1B", 4000), ("13B", 1000), ("32B", 2000)])
def test_released_warmups_in_steps(name, steps):
    schedule, tokens_per_step = PUBLISHED[name]
    rates = learning_rate(schedule, np.array([0, 1, steps // 2, steps]), tokens_per_step)
    peak = schedule.peak
    np.testing.assert_allclose(rates, [0, peak / steps, peak / 2, peak], rtol=1e-12)


def test_published_configurations_give_these_rates(data_dir):
    """The peaks and lengths above are those of the released YAML files."""
    folder = data_dir / "olmo2_official_configs"
    for name, peak in (("1B", "4.0e-4"), ("7B", "3.0e-4")):
        text = (folder / f"OLMo2-{name}-stage1.nopaths.yaml").read_text()
        for line in (
            f"learning_rate: {peak}",
            "t_warmup: 8388608000",
            "t_max: 5e12",
            "alpha_f: 0.1",
        ):
            assert line in text
        # What stage 2 starts from, read at step 928000 for the 7B.
        stage2 = (folder / f"OLMo2-{name}-stage2-seed42.nopaths.yaml").read_text()
        step = {"1B": 1_907_359, "7B": 928_000}[name]
        schedule, tokens_per_step = PUBLISHED[name]
        rate = float(learning_rate(schedule, step, tokens_per_step))
        written = float(stage2.split("learning_rate:")[1].split()[0])
        assert rate == pytest.approx(written, abs=5.1e-10)


def test_linear_anneal_reaches_zero_and_stays():
    schedule = ScheduleConfig("linear", 6.1499e-5, duration=11_921)
    rates = learning_rate(schedule, np.array([0, 11_920, 11_921, 11_926, 11_931]))
    assert rates[0] == 6.1499e-5
    assert rates[1] == pytest.approx(6.1499e-5 / 11_921)
    assert list(rates[2:]) == [0, 0, 0]


def test_constant_and_wsd():
    constant = ScheduleConfig("constant", 1e-3, warmup=10)
    np.testing.assert_allclose(
        learning_rate(constant, np.array([5, 10, 10**9])), [5e-4, 1e-3, 1e-3]
    )
    wsd = ScheduleConfig("wsd", 1e-3, warmup=10, duration=100, decay=20, final_fraction=0.5)
    rates = learning_rate(wsd, np.array([5, 10, 80, 90, 100, 200]))
    np.testing.assert_allclose(rates, [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 5e-4], rtol=1e-12)


def test_duration_defaults_to_the_whole_training():
    for units, duration in (("steps", 50), ("tokens", 50 * 128)):
        schedule = ScheduleConfig("linear", 1.0, units=units).resolve(50, tokens_per_step=128)
        assert schedule.duration == duration
        assert learning_rate(schedule, 25, 128) == 0.5


@pytest.mark.parametrize("name", PUBLISHED)
def test_jitted_rates_follow_the_exact_ones(name):
    schedule, tokens_per_step = PUBLISHED[name]
    steps = np.array([1, 999, 2000, 4001, 100_000, 500_000, 721_901, 900_000])
    inside = jax.jit(lambda t: learning_rate(schedule, t, tokens_per_step))(jnp.asarray(steps))
    assert inside.dtype == jnp.float32
    exact = learning_rate(schedule, steps, tokens_per_step)
    assert exact.dtype == np.float64
    np.testing.assert_allclose(inside, exact, rtol=3e-6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"peak": -1},
        {"duration": 0},
        {"kind": "wsd", "duration": 10},
        {"warmup": 20, "duration": 10},
    ],
)
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(UserError, match="schedule"):
        ScheduleConfig(**arguments)
