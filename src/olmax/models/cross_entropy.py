"""Cross-entropy of hidden states under the output matrix, on every device for its own tokens."""

import jax

from kernels_pallas.linear_cross_entropy import linear_cross_entropy
from kernels_pallas.xla_tpu import in_memory
from olmax.models.annotations import annotate, mesh_axes, per_device


def cross_entropy(
    hidden_BLD: jax.Array,
    kernel_DV: jax.Array,
    targets_BL: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and the log-sum-exp of the logits, both float32 [B, L], in nats.

    On a mesh each device gathers its columns of the matrix once, in the dtype of the hidden states,
    and cuts only its own tokens into chunks: were the chunks cut from all tokens, every chunk would
    lie on one device and the others would wait for it.
    """
    vocab_axes = mesh_axes("vocab", kernel_DV.shape[1])
    hidden_BLD, kernel_DV = _reduced_early(hidden_BLD, kernel_DV)

    def local(targets_BL, hidden_BLD, kernel_DV):
        loss_T, lse_T = linear_cross_entropy(
            hidden_BLD.reshape(-1, hidden_BLD.shape[-1]),
            kernel_DV,
            targets_BL.reshape(-1),
            vocab_axes=vocab_axes,
            implementation=implementation,
        )
        return loss_T.reshape(targets_BL.shape), lse_T.reshape(targets_BL.shape)

    tokens = ("batch", "length")
    return per_device(
        local,
        [tokens, (*tokens, None), (None, "vocab")],
        targets_BL,
        hidden_BLD,
        kernel_DV.astype(hidden_BLD.dtype),
    )


@jax.custom_vjp
def _reduced_early(hidden_BLD, kernel_DV):
    """Both unchanged. The gradient of the matrix is summed over the devices before the layers'
    backward pass: XLA's TPU backend would leave that for the end, and every device would carry its
    own whole matrix of gradients through all layers.
    """
    return hidden_BLD, kernel_DV


def _reduced_early_forward(hidden_BLD, kernel_DV):
    return _reduced_early(hidden_BLD, kernel_DV), None


def _reduced_early_backward(_, gradients):
    d_hidden_BLD, d_kernel_DV = gradients
    return in_memory((d_hidden_BLD, annotate(d_kernel_DV, ("embed", "vocab"))))


_reduced_early.defvjp(_reduced_early_forward, _reduced_early_backward)
