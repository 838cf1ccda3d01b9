"""SwiGLU feed-forward block."""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from olmax.models import parameters
from olmax.models.annotations import annotate
from olmax.models.config import DecoderConfig, Execution
from olmax.models.linear import project


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)); gate and up are one fused matrix."""

    def __init__(self, config: DecoderConfig, execution: Execution, *, stack=(), rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        if config.init == "scaled":
            in_std, out_std = (
                parameters.fan_in_std(d),
                parameters.depth_scaled_std(d, config.n_layers, len(stack) + 2),
            )
        else:
            in_std = out_std = config.init_std
        self.gate_up = parameters.param(
            rngs,
            parameters.truncated_normal(in_std),
            [*stack, (d, "embed"), (2, None), (f, "mlp")],
            execution.param_dtype,
        )
        self.down = parameters.param(
            rngs,
            parameters.truncated_normal(out_std),
            [*stack, (f, "mlp"), (d, "embed")],
            execution.param_dtype,
        )

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        gate_up_BLCF = project(x_BLD, self.gate_up[...])
        gate_up_BLCF = checkpoint_name(gate_up_BLCF, "gate_up")
        gate_up_BLCF = annotate(gate_up_BLCF, ("batch", "length", None, "mlp"))
        hidden_BLF = jax.nn.silu(gate_up_BLCF[..., 0, :]) * gate_up_BLCF[..., 1, :]
        return project(hidden_BLF, self.down[...])
