"""What the routers of a mixture of experts do with text: specs/olmoe.md section 4."""

from olmax.routing.routes import Routes, collect, windows
from olmax.routing.statistics import (
    coactivation,
    domain_specialization,
    expert_load,
    saturation,
    vocabulary_specialization,
)

__all__ = [
    "Routes",
    "coactivation",
    "collect",
    "domain_specialization",
    "expert_load",
    "saturation",
    "vocabulary_specialization",
    "windows",
]
