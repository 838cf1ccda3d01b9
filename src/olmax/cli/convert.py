"""`olmax convert`: a model from one checkpoint format to another."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint of any readable kind to a Hugging Face directory or to an Orbax
    checkpoint of ours.

    Example: olmax convert --input runs/olmo2-tiny/stage1 --output exported --dtype bfloat16
    """

    input: str
    """Model path: Hugging Face directory, hub id, run directory, checkpoint, OLMo or OLMo-core
    directory.
    """
    output: str
    """Directory to create."""
    format: Literal["huggingface", "orbax"] = "huggingface"
    """What to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the written parameters; the input's own when left out (float32 if its tensors
    differ).
    """
    tokenizer: str | None = None
    """tokenizer.json or its directory; the input's own when left out."""
    max_shard_gb: float = 5.0
    """Hugging Face weights beyond this many gigabytes are split over several files."""

    def run(self) -> None:
        """Reads and writes the model."""
        from olmax import interop, pretrained

        dtype = self.dtype
        if dtype is None and interop.detect(self.input) is not None:
            dtype = interop.stored_dtype(self.input)
        dtype = dtype if dtype in ("bfloat16", "float16") else "float32"
        tokenizer = self.tokenizer or interop.find_tokenizer(self.input)
        model = pretrained.load_model(self.input, param_dtype=dtype)
        if self.format == "orbax":
            from olmax.training.model_checkpoint import save_model

            save_model(model, self.output, tokenizer=tokenizer)
        else:
            max_shard_bytes = int(self.max_shard_gb * 10**9)
            interop.save_huggingface(
                model,
                self.output,
                dtype=dtype,
                tokenizer=tokenizer,
                max_shard_bytes=max_shard_bytes,
            )
        print(f"{self.output}: {model.config.num_params:,} parameters, {dtype}, {self.format}")
