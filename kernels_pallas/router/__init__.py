"""Which experts a token goes to, where its rows stand among the experts' rows, and the way back."""

from kernels_pallas.router.api import IMPLEMENTATIONS, PER_DEVICE, choose, combine, dispatch, route
from kernels_pallas.router.routing import Dispatch, Routing

__all__ = [
    "IMPLEMENTATIONS",
    "PER_DEVICE",
    "Dispatch",
    "Routing",
    "choose",
    "combine",
    "dispatch",
    "route",
]
