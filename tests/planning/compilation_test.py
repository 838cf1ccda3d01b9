"""What is known of a step before it is compiled, against what jit does on a faked CPU mesh."""

import jax
import jax.numpy as jnp
import pytest

from olmax import sharding
from olmax.errors import UserError
from olmax.models.config import Execution
from olmax.models.presets import get_preset
from olmax.planning import compilation


@pytest.fixture(scope="module")
def mesh():
    if jax.device_count() < 4:
        pytest.skip(
            "needs several (faked) devices: XLA_FLAGS=--xla_force_host_platform_device_count"
        )
    return sharding.make_mesh("fsdp=2,tensor=2", jax.devices()[:4])


def test_argument_bytes_are_those_of_the_compiled_step(mesh):
    config = get_preset("olmo2-tiny")
    step = compilation.build(config, Execution(), mesh, tokens_per_step=4 * 64)
    batch = step.abstract_batch({"tokens": jax.ShapeDtypeStruct((4, 64), jnp.int32)})
    compiled = step.step.lower(step.abstract_state, batch).compile()
    expected = compilation.device_bytes((step.abstract_state, batch))
    assert compiled.memory_analysis().argument_size_in_bytes == expected
    parameters = compilation.device_bytes(step.abstract_state.params)
    assert parameters < config.num_params * 4
    assert compilation.device_bytes(step.abstract_state.opt_state) > 2 * parameters - 1


def test_what_does_not_divide_is_refused(mesh):
    config = get_preset("olmo2-tiny")
    compilation.check(config, mesh, 4, 64, 2)
    with pytest.raises(UserError, match="take 2 or 4"):
        compilation.check(config, mesh, 3, 64, 1)
    with pytest.raises(UserError, match="micro-batches"):
        compilation.check(config, mesh, 4, 64, 4)


def test_messages_of_a_compiler_that_has_too_little_memory():
    assert (
        compilation._needed(
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (17.50G) exceeds available HBM (15.75G).",
            2**30,
        )
        == 18.5 * 2**30
    )
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 98.50G of 95.74G hbm."
    assert compilation._needed(whole, 2**30) == 98.5 * 2**30
    vmem = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in vmem"
    assert compilation._needed(vmem, 2**30) is None
