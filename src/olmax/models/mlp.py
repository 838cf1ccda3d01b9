"""SwiGLU feed-forward block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.xla_cpu import apart
from kernels_pallas.xla_tpu import in_memory, on_tpu
from olmax.models import parameters
from olmax.models.annotations import annotate
from olmax.models.config import DecoderConfig, Execution
from olmax.models.linear import input_gradient, kernel_gradient, project


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
        # Two products although the matrix is one: their gradients need not be joined in memory.
        gate_up_DCF = self.gate_up[...]
        gate_BLF, up_BLF = (project(x_BLD, gate_up_DCF[:, index]) for index in (0, 1))
        gate_BLF, up_BLF = checkpoint_name((gate_BLF, up_BLF), "gate_up")
        gate_BLF, up_BLF = (annotate(y, ("batch", "length", "mlp")) for y in (gate_BLF, up_BLF))
        return down(gate_BLF, up_BLF, self.down[...])


@jax.custom_vjp
def down(gate: jax.Array, up: jax.Array, kernel_FD: jax.Array) -> jax.Array:
    """project(swiglu(gate, up), kernel)."""
    return _down_forward(gate, up, kernel_FD)[0]


def _down_forward(gate, up, kernel_FD):
    hidden = swiglu(gate, up)
    return project(hidden, kernel_FD), (gate, up, hidden, kernel_FD)


def _down_backward(residuals, dy):
    gate, up, hidden, kernel_FD = residuals
    dy = apart(dy)
    d_hidden = input_gradient(dy, kernel_FD)
    hidden, d_gate, d_up = on_tpu(_at_once, _gradients, gate, up, hidden, d_hidden)
    return d_gate, d_up, kernel_gradient(hidden, dy, kernel_FD.dtype)


down.defvjp(_down_forward, _down_backward)


def _gradients(gate, up, hidden, d_hidden):
    return hidden, *_swiglu_backward((gate, up), d_hidden)


def _at_once(gate, up, hidden, d_hidden):
    """The same with the hidden values computed again, inside the product that makes d_hidden."""
    del hidden
    return in_memory(_gradients(gate, up, swiglu(gate, up), d_hidden))


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, computed in float32 and rounded once to their dtype."""
    gate32 = gate.astype(jnp.float32)
    return (gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)).astype(gate.dtype)


def _swiglu_forward(gate, up):
    return swiglu(gate, up), (gate, up)


def _swiglu_backward(residuals, d_hidden):
    dtype = d_hidden.dtype
    gate, up, d_hidden = (x.astype(jnp.float32) for x in (*residuals, d_hidden))
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_hidden * gate * sigmoid
    return d_gate.astype(dtype), d_up.astype(dtype)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)
