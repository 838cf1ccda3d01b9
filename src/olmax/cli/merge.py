"""`olmax merge`: a soup of several models."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Merge:
    """Average the parameters of several models of one architecture (a soup), in float32, tensor by
    tensor.

    Example: olmax merge --models runs/anneal-1 runs/anneal-2 runs/anneal-3 --output soup
    """

    models: tuple[str, ...]
    """Model paths: Hugging Face directories, hub ids, run directories or checkpoints; kinds may be
    mixed.
    """
    output: str
    """Hugging Face directory to create."""
    weights: tuple[float, ...] | None = None
    """One non-negative weight a model, divided by their sum; equal when left out."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the output; the ingredients' own when left out (float32 if they differ)."""
    tokenizer: str | None = None
    """tokenizer.json or its directory; the ingredients' own when left out."""

    def run(self) -> None:
        """Writes the soup."""
        from olmax.merging import soup

        soup(
            self.models,
            self.output,
            weights=self.weights,
            dtype=self.dtype,
            tokenizer=self.tokenizer,
        )
        print(f"{self.output}: soup of {len(self.models)} models")
