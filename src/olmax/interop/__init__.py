"""Checkpoints of other code bases: Hugging Face directories in and out, the old OLMo trainer and
OLMo-core in.
"""

from olmax.interop.load import load_config, load_model, stored_dtype
from olmax.interop.save import save_huggingface
from olmax.interop.source import detect
from olmax.interop.tokenizer_files import find_tokenizer, stop_token_ids

__all__ = [
    "detect",
    "find_tokenizer",
    "load_config",
    "load_model",
    "save_huggingface",
    "stop_token_ids",
    "stored_dtype",
]
