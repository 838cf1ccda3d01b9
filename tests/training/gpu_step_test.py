"""The training step compiled for GPUs that are not here, sharded, with the kernels for them."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import gpu_compiler
from olmax import sharding
from olmax.models.config import Execution
from olmax.models.presets import get_preset
from olmax.planning import compilation

GPUS = 8


def train_step(model: str, mesh: str, kernels: str | None, batch_size: int = 16, length: int = 512):
    """For `kernels_pallas.gpu_compiler`; `kernels`: of experts and loss."""
    execution = Execution(compute_dtype="bfloat16", remat="full", experts=kernels, loss=kernels)
    on = sharding.make_mesh(sharding.MeshConfig.parse(mesh), gpu_compiler.devices("h100", GPUS))
    step = compilation.build(get_preset(model), execution, on, tokens_per_step=batch_size * length)
    batch = step.abstract_batch({"tokens": jax.ShapeDtypeStruct((batch_size, length), jnp.int32)})
    return step.step, (step.abstract_state, batch)


@pytest.mark.slow
@pytest.mark.skipif(
    not gpu_compiler.available(), reason="the GPU compiler is not installed (make gpu-compiler)"
)
@pytest.mark.parametrize(
    ("mesh", "kernels"),
    [("fsdp=8", None), ("fsdp=8", "pallas_gpu"), ("fsdp=2,expert=4", "pallas_gpu")],
)
def test_a_mixture_of_experts_compiles_for_eight_gpus(mesh, kernels):
    program = gpu_compiler.compile_for(
        f"{__name__}:train_step", model="olmoe-tiny", mesh=mesh, kernels=kernels
    )
    names = {kernel.name for kernel in program.kernels}
    if kernels is None:
        assert not names
    else:
        assert {"grouped_product", "grouped_outer"} <= names
        assert {f"linear_cross_entropy_{each}" for each in ("statistics", "gradient")} <= names
    # Float32 parameters and AdamW's two moments, all cut in eight, or all but the experts in two.
    state = 12 * get_preset("olmoe-tiny").num_params
    assert state / 8 <= program.argument_bytes <= state / (8 if "fsdp=8" in mesh else 2) + 2**17
