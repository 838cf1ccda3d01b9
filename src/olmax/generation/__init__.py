"""Sampling over the models' KV cache."""

from olmax.generation.decoding import Completion, complete, generate
from olmax.generation.sampling import Sampling
from olmax.generation.text import TextCompletion, complete_text

__all__ = ["Completion", "Sampling", "TextCompletion", "complete", "complete_text", "generate"]
