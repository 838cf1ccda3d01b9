"""Attention over a cut sequence against attention over the whole one, on 8 faked devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import schedule, targets
from kernels_pallas.attention import attention, ring_attention

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def results(function, *arrays):
    def both(q, k, v, d_out):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)

    return jax.jit(both, compiler_options=QUICK)(*arrays)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (faked) devices")
@pytest.mark.parametrize(
    ("implementation", "devices", "options"),
    [
        ("reference", 8, dict(segments=True)),
        ("reference", 8, dict(causal=False)),
        ("reference", 8, dict(window=21)),
        ("reference", 8, dict(window=21, causal=False)),
        ("reference", 8, dict(subsegments=True)),
        ("pallas_tpu", 8, dict(segments=True)),
    ],
)
def test_a_cut_sequence_gets_what_the_whole_one_gets(implementation, devices, options):
    length, q_heads, kv_heads, width = 8 * 16, 4, 2, 16
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (2, length, q_heads, width)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, kv_heads, width)) for key in keys[2:])
    options, ids = dict(options), None
    kind = next((name for name in ("segments", "subsegments") if options.pop(name, False)), None)
    if kind:
        # The last quarter is padding; of subsegments, a prefix that every branch sees.
        ids = jnp.asarray(np.broadcast_to((1 + np.arange(length) // 32) % 4, (2, length)))
        options |= {f"{side}_{kind[:-1]}_ids": ids for side in ("q", "kv")}
    expected = results(
        lambda q, k, v: attention(q, k, v, implementation="reference", **options), q, k, v, d_out
    )
    mesh = Mesh(np.array(jax.devices()[:devices]), ("context",))
    cut = PartitionSpec(None, "context")

    def part(q, k, v, ids):
        return ring_attention(
            q,
            k,
            v,
            axis_name="context",
            axis_size=devices,
            implementation=implementation,
            interpret=implementation == "pallas_tpu",
            **{name: value for name, value in options.items() if not name.endswith("ids")},
            **({f"{kind[:-1]}_ids": ids} if kind else {}),
        )

    ring = jax.shard_map(part, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)
    some_ids = jnp.zeros((2, length), jnp.int32) if ids is None else ids
    got = results(lambda q, k, v: ring(q, k, v, some_ids), q, k, v, d_out)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(schedule.libtpu_version() is None, reason="libtpu is not installed")
def test_compiles_for_a_slice(monkeypatch):
    for name, value in schedule.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    mesh = Mesh(np.array(topology.devices).reshape(4), ("context",))
    cut = PartitionSpec(None, "context")
    sharding = NamedSharding(mesh, cut)
    x = jax.ShapeDtypeStruct((1, 2048, 2, 128), jnp.bfloat16, sharding=sharding)
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32, sharding=sharding)

    def part(q, k, v, ids):
        return ring_attention(q, k, v, axis_name="context", axis_size=4, segment_ids=ids)

    ring = jax.shard_map(part, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False)

    def both(q, k, v, ids, d_out):
        out, pull = jax.vjp(lambda q, k, v: ring(q, k, v, ids), q, k, v)
        return out, *pull(d_out)

    with targets.compiling_for("tpu"):
        lowered = jax.jit(both).trace(x, x, x, ids, x).lower(lowering_platforms=("tpu",))
    program = lowered.compile().as_text()
    assert program.count("tpu_custom_call") == 2
    assert "collective-permute-start" in program and "all-gather" not in program


def test_what_a_ring_cannot_take_is_an_error():
    x = jnp.zeros((1, 8, 2, 16))
    with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 9\), expected \(1, 8\)"):
        ring_attention(
            x, x, x, axis_name="context", axis_size=2, segment_ids=jnp.zeros((1, 9), jnp.int32)
        )
    with pytest.raises(ValueError, match="implementation 'blocked'"):
        ring_attention(x, x, x, axis_name="context", axis_size=2, implementation="blocked")
