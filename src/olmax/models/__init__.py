"""Flax NNX models and their configurations. No mesh, no files, no optimiser."""

from olmax.models.config import DecoderConfig, Execution, Llama3RopeScaling, MoEConfig
from olmax.models.decoder import Decoder
from olmax.models.kv_cache import KVCache, init_cache
from olmax.models.paged_cache import PagedCache, init_paged_cache
from olmax.models.presets import PRESETS, get_preset

__all__ = [
    "PRESETS",
    "Decoder",
    "DecoderConfig",
    "Execution",
    "KVCache",
    "Llama3RopeScaling",
    "MoEConfig",
    "PagedCache",
    "get_preset",
    "init_cache",
    "init_paged_cache",
]
