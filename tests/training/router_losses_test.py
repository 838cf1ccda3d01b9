"""Auxiliary losses: values that can be computed by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from olmax.models import MoEConfig
from olmax.models.moe import RouterStatistics
from olmax.training.router_losses import RouterLosses, router_losses

MOE = MoEConfig(4, 2)


def statistics(counts, probabilities, lse2, tokens):
    """One layer; a group a row."""
    arrays = (jnp.asarray(x, jnp.float32)[None] for x in (counts, probabilities, lse2, tokens))
    return RouterStatistics(*arrays)


def test_perfect_balance_costs_the_weight():
    found = statistics([[4, 4, 4, 4]], [[2, 2, 2, 2]], [0], [8])
    loss, metrics = router_losses(found, MOE, RouterLosses())
    assert float(metrics["load_balance_loss"]) == pytest.approx(0.01, rel=1e-6)
    assert float(loss) == pytest.approx(0.01, rel=1e-6)
    assert float(metrics["max_violation"]) == 0 and float(metrics["min_load"]) == 1


@pytest.mark.parametrize("divide", [True, False])
def test_z_loss_of_constant_logits(divide):
    """Logits c everywhere: (c + ln E)^2 w, over k as the reference divides it."""
    z = (3.0 + math.log(4)) ** 2
    found = statistics([[4, 4, 4, 4]], [[2, 2, 2, 2]], [8 * z], [8])
    weights = RouterLosses(z=0.001, divide_z_by_top_k=divide)
    _, metrics = router_losses(found, MOE, weights)
    expected = 0.001 * z / (2 if divide else 1)
    assert float(metrics["router_z_loss"]) == pytest.approx(expected, rel=1e-6)


def test_the_reference_formula_with_several_layers_and_groups():
    """w E / (L T k) sum_l sum_e n P for each device, mean over devices."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (3, 2, 4)).astype(np.float32)
    sums = rng.random((3, 2, 4)).astype(np.float32)
    found = RouterStatistics(
        jnp.asarray(counts), jnp.asarray(sums), jnp.zeros((3, 2)), jnp.full((3, 2), 8.0)
    )
    expected = np.mean(
        [0.01 * 4 / (3 * 8 * 2) * (counts[:, s] * sums[:, s] / 8).sum() for s in range(2)]
    )
    _, metrics = router_losses(found, MOE, RouterLosses())
    assert float(metrics["load_balance_loss"]) == pytest.approx(expected, rel=1e-5)


def test_global_statistics_forgive_devices_that_balance_each_other():
    counts, sums = [[16, 0, 0, 0], [0, 16, 0, 0]], [[8, 0, 0, 0], [0, 8, 0, 0]]
    found = statistics(counts, sums, [0, 0], [8, 8])
    values = [
        float(router_losses(found, MOE, RouterLosses(statistics=kind))[1]["load_balance_loss"])
        for kind in ("device", "global")
    ]
    assert values == pytest.approx([0.04, 0.02])


def test_gradient_flows_through_the_probabilities_only():
    def balance(counts, sums):
        found = statistics(counts, sums, [0], [8])
        return router_losses(found, MOE, RouterLosses())[0]

    d_counts, d_sums = jax.grad(balance, (0, 1))(
        jnp.array([[10.0, 2, 2, 2]]), jnp.array([[5.0, 1, 1, 1]])
    )
    assert not np.asarray(d_counts).any()
    assert float(d_sums[0, 0]) > float(d_sums[0, 1]) > 0


def test_an_expert_that_gets_nothing_shows():
    found = statistics([[16, 0, 0, 0]], [[8, 0, 0, 0]], [0], [8])
    _, metrics = router_losses(found, MOE, RouterLosses())
    assert float(metrics["max_violation"]) == 3 and float(metrics["min_load"]) == 0
