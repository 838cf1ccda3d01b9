"""A clear error where a program for TPUs is lowered for something else."""

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

_tpu_only_p = Primitive("tpu_only")


def tpu_only(x: jax.Array, name: str) -> jax.Array:
    """`x` in programs for TPUs; lowering for another platform raises a ValueError naming `name`.

    Decided when the program is lowered, not when it is traced: a host without TPUs may compile for
    them.
    """
    return _tpu_only_p.bind(x, name=name)


def _refuse(ctx, x, *, name):
    platforms = ", ".join(ctx.module_context.platforms)
    raise ValueError(
        f"{name}: implementation 'pallas_tpu' runs on TPUs only and this program is for "
        f"{platforms}; give interpret=True to run it here, or implementation=None"
    )


_tpu_only_p.def_impl(lambda x, *, name: jax.jit(tpu_only, static_argnums=1)(x, name))
_tpu_only_p.def_abstract_eval(lambda x, *, name: x)
mlir.register_lowering(_tpu_only_p, _refuse)
mlir.register_lowering(_tpu_only_p, lambda ctx, x, *, name: [x], platform="tpu")
batching.defvectorized(_tpu_only_p)
