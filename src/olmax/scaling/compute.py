"""Parameters and floating-point operations of a ladder model, counted as the fits expect them."""

import dataclasses

PADDED_VOCAB = 100_352
"""Vocabulary of the released ladder: 100,278 ids padded to a multiple of 128."""


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the counts depend on, for an OLMo 2 decoder with as many key/value as query heads."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    """Width of the feed-forward layer after gating (half of the fused projection)."""
    vocab_size: int = PADDED_VOCAB
    """Padded vocabulary."""
    seq_len: int = 4096

    @property
    def parameters(self) -> int:
        """N of the fits: all parameters but the input embedding; the output head counts.

        Per layer 4 d^2 for attention, 3 d d_ff for SwiGLU and 4 d for two block norms and the
        full-width query and key norms; then the final norm and the head.
        """
        d = self.d_model
        layer = 4 * d * d + 3 * d * self.d_ff + 4 * d
        return self.n_layers * layer + d + self.vocab_size * d

    @property
    def total_parameters(self) -> int:
        """`parameters` and the input embedding."""
        return self.parameters + self.vocab_size * self.d_model

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token as the released ladder counts them.

        Forward 2 N + 4 layers d S, backward twice that. The backward term counts the input
        embedding and the forward term does not, an asymmetry that is kept to get the released
        numbers.
        """
        attention = 4 * self.n_layers * self.d_model * self.seq_len
        return (2 * self.parameters + attention) + (4 * self.total_parameters + 2 * attention)


SIZES: dict[str, ModelShape] = {
    "190M": ModelShape(768, 12, 12, 3072),
    "370M": ModelShape(1024, 16, 16, 4096),
    "600M": ModelShape(1344, 16, 16, 5376),
    "760M": ModelShape(1536, 16, 16, 6144),
    "1.3B": ModelShape(2048, 16, 16, 8192),
    "3.2B": ModelShape(3328, 16, 16, 13312),
    "7B": ModelShape(4096, 32, 32, 11008),
    "13B": ModelShape(5120, 40, 40, 13824),
}
"""Shapes of the released ladder, the targets included."""

SIZE_ALIASES = {"1B": "1.3B", "3B": "3.2B", "peteish7": "7B", "peteish13": "13B"}
"""Other names of sizes in the released file names."""


def known_size(label: str) -> tuple[str, ModelShape] | None:
    """Canonical name and shape of a released size, by any of its names; None when unknown."""
    name = SIZE_ALIASES.get(label, label)
    return (name, SIZES[name]) if name in SIZES else None
