"""Cross-entropy of hidden states under the output matrix, on every device for its own tokens."""

import jax

from kernels_pallas.linear_cross_entropy import linear_cross_entropy
from olmax.models.annotations import mesh_axes, per_device


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
