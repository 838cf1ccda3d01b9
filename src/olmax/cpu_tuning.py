"""Process-wide settings that make XLA's CPU backend fast, and one that makes it correct.

Where libtpu is installed but no TPU is, they also keep it quiet (`absent_tpu`).

The command line and the experiments call `apply` before JAX starts; `olmax.load` calls
`set_environment` and leaves the allocator of a user's process alone; importing olmax does neither.
docs/performance.md has the measurements.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

from olmax import absent_tpu

XLA_FLAGS = {
    # Matrix products alone go to the YNNPACK library. By default jaxlib 0.12 also hands it
    # reductions together with what leads to them, and there the sum of products with a product
    # that has a broadcast operand comes out wrong: sum(E * (E @ broadcast(c))).
    "xla_cpu_experimental_ynn_fusion_type": "individual_dot",
    # Exponentials and other float32 loops are 1.2 to 1.8 times faster than with 256 bits.
    "xla_cpu_prefer_vector_width": "512",
}

# XLA aborts on a flag it does not know, and these come and go with its versions.
_KNOWN_JAXLIB = "0.12."

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def apply() -> None:
    """`set_environment`, and the allocator tuned where JAX runs on CPUs."""
    set_environment()
    if _runs_on_cpu():
        keep_freed_memory()


def set_environment() -> None:
    """Adds to `XLA_FLAGS` what the user has not set, and tells libtpu where there is no TPU.

    Call it before the first use of a JAX device; later it has no effect.
    """
    if importlib.metadata.version("jaxlib").startswith(_KNOWN_JAXLIB):
        flags = os.environ.get("XLA_FLAGS", "").split()
        taken = {flag.lstrip("-").partition("=")[0] for flag in flags}
        flags += [f"--{name}={value}" for name, value in XLA_FLAGS.items() if name not in taken]
        os.environ["XLA_FLAGS"] = " ".join(flags)
    if importlib.util.find_spec("libtpu") is not None and not absent_tpu.attached():
        absent_tpu.announce()


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for the next request instead of returning it.

    XLA allocates the temporary memory of a step anew every time. Returned to the system in between,
    every page of it is mapped and zeroed again in every step, which takes up to a fifth of a small
    step. The process's memory then never shrinks. Only glibc knows these settings.

    Returns:
      Whether it did anything.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    largest = 2**31 - 1
    # One arena: the others cannot hold large blocks and would map them.
    settings = {_M_MMAP_THRESHOLD: largest, _M_TRIM_THRESHOLD: largest, _M_ARENA_MAX: 1}
    return all(libc.mallopt(option, value) for option, value in settings.items())


def _runs_on_cpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    gpu = any(importlib.util.find_spec(name) for name in _GPU_PLUGINS)
    return not gpu and not absent_tpu.attached()
