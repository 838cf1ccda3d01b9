"""`olmax upcycle`: a mixture of experts out of a dense model."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Sparse upcycling: every expert starts as the dense model's feed-forward block.

    Example: olmax upcycle --input dense --output moe --experts 8 --experts-per-token 2
    """

    input: str
    """Model path of a dense model."""
    output: str
    """Directory to create: a checkpoint that training starts from, or a Hugging Face directory."""
    experts: int = 8
    """Experts of every layer."""
    experts_per_token: int = 2
    """Experts that a token is sent to."""
    normalize_weights: bool = False
    """Divide a token's weights by their sum; then the result computes what the dense model does."""
    shared_expert: bool = False
    """Keep one more copy that every token passes through."""
    noise: float = 0.0
    """Share of the experts' entries that are drawn anew (the paper tried 0.5, without gain)."""
    seed: int = 0
    """Of router and noise."""
    format: Literal["orbax", "huggingface"] = "orbax"
    """What to write; Hugging Face's olmoe needs pre-norm and QK-norm, as OLMoE has them."""
    tokenizer: str | None = None
    """tokenizer.json or its directory; the input's own when left out."""

    def run(self) -> None:
        """Reads, upcycles and writes."""
        from olmax import interop, pretrained
        from olmax.models.config import MoEConfig
        from olmax.models.upcycling import upcycle
        from olmax.training.model_checkpoint import save_model

        dense = pretrained.load_model(self.input)
        moe = MoEConfig(
            self.experts,
            self.experts_per_token,
            normalize_weights=self.normalize_weights,
            shared_d_ff=dense.config.d_ff if self.shared_expert else 0,
        )
        model = upcycle(dense, moe, noise=self.noise, seed=self.seed)
        tokenizer = self.tokenizer or interop.find_tokenizer(self.input)
        if self.format == "orbax":
            save_model(model, self.output, tokenizer=tokenizer)
        else:
            interop.save_huggingface(model, self.output, tokenizer=tokenizer)
        config = model.config
        print(
            f"{self.output}: {config.num_params:,} parameters, {config.num_active_params:,} active"
        )
