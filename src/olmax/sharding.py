"""Where everything lies on a mesh: one table from logical axis names to mesh axes, and the mesh
itself.

Models name the logical axes of their parameters and activations and know nothing of this file.
Compilation is `jax.jit` with shardings (GSPMD): a reduction over a sharded axis, such as the
full-width QK-norm under tensor parallelism, gets its collective from the compiler.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from olmax.errors import UserError
from olmax.models import annotations
from olmax.models.config import DecoderConfig, Execution
from olmax.models.decoder import Decoder

MESH_AXES = ("slice", "data", "fsdp", "expert", "tensor", "context")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis. One axis may be -1: it takes the devices that are left.

    `slices` are whole TPU slices (or hosts) joined by the data-centre network; only gradients cross
    them.
    """

    slices: int = 1
    data: int = 1
    fsdp: int = -1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """From `fsdp=4,tensor=2`; axes that are not named are 1, fsdp takes what is left unless one
        is -1.

        Raises:
          UserError: unknown axis or a size that is no integer.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        sizes = {}
        for item in filter(None, text.replace(" ", "").split(",")):
            name, _, size = item.partition("=")
            if name not in names:
                raise UserError(
                    f"mesh {text!r}: unknown axis {name!r}; the axes are {', '.join(sorted(names))}"
                )
            try:
                sizes[name] = int(size)
            except ValueError:
                raise UserError(
                    f"mesh {text!r}: size of axis {name!r} must be an integer, is {size!r}"
                ) from None
        if "fsdp" not in sizes and -1 in sizes.values():
            sizes["fsdp"] = 1
        return cls(**sizes)

    def resolve(self, device_count: int) -> "MeshConfig":
        """The same with -1 filled in so that all devices are used.

        Raises:
          UserError: the axes do not multiply to `device_count`.
        """
        sizes = dataclasses.asdict(self)
        free = [name for name, size in sizes.items() if size == -1]
        bad = [name for name, size in sizes.items() if size < 1 and size != -1]
        if bad or len(free) > 1:
            raise UserError(f"mesh {self}: sizes must be at least 1, and at most one axis -1")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if free and device_count % fixed == 0:
            sizes[free[0]] = device_count // fixed
        elif free or fixed != device_count:
            need = f"a multiple of {fixed}" if free else f"{fixed}"
            raise UserError(
                f"mesh {_describe(sizes)} needs {need} devices, there are {device_count}; "
                f"change the axes so that they multiply to {device_count}"
            )
        return MeshConfig(**sizes)


def _describe(sizes: Mapping[str, int]) -> str:
    return (
        ",".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "of one device"
    )


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis name -> mesh axis or axes (None: replicated)."""

    # Activations.
    batch: tuple[str, ...] = ("slice", "data", "fsdp", "expert")
    length: str | None = "context"
    # Parameters and activations. A weight's `embed` side is cut over fsdp; activations keep their
    # width whole.
    embed: str | None = "fsdp"
    kv_heads: str | None = "tensor"
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    experts: str | None = "expert"
    layers: str | None = None

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Partition spec of an array with these logical axes.

        Raises:
          ValueError: an unknown name, or one mesh axis used for two dimensions.
        """
        entries = []
        for axis in axes:
            if axis is not None and not hasattr(self, axis):
                raise ValueError(f"unknown logical axis {axis!r} in {tuple(axes)}")
            entries.append(None if axis is None else getattr(self, axis))
        used = [
            name
            for entry in entries
            if entry
            for name in ([entry] if isinstance(entry, str) else entry)
        ]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {tuple(axes)} map one mesh axis twice: {entries}")
        return PartitionSpec(*entries)


DEFAULT_RULES = Rules()


def make_mesh(
    config: MeshConfig | str = MeshConfig(), devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with the axes `MESH_AXES` over all devices (or the given ones).

    On TPUs the devices are ordered along the physical interconnect; slices are the outermost axis.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    config = MeshConfig.parse(config) if isinstance(config, str) else config
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(dataclasses.astuple(config.resolve(len(devices))))
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        if shape[0] > 1:
            inner, outer = (1, *shape[1:]), (shape[0], *[1] * (len(shape) - 1))
            array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
        else:
            array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = np.asarray(devices).reshape(shape)
    return Mesh(array, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def check_divisible(model: DecoderConfig, mesh: Mesh) -> None:
    """Checks that the mesh divides the model's dimensions.

    Raises:
      UserError: naming the dimension, its size and the axis that does not divide it.
    """
    dims = (
        ("d_model", model.d_model, "fsdp"),
        ("n_kv_heads", model.n_kv_heads, "tensor"),
        ("d_ff", model.d_ff, "tensor"),
        ("vocab_size", model.vocab_size, "tensor"),
    )
    if model.moe is not None:
        dims += (("moe.n_experts", model.moe.n_experts, "expert"),)
        if model.moe.shared_d_ff:
            dims += (("moe.shared_d_ff", model.moe.shared_d_ff, "tensor"),)
    for name, size, axis in dims:
        if size % mesh.shape[axis]:
            raise UserError(
                f"mesh axis {axis}={mesh.shape[axis]} does not divide {name}={size}; "
                f"choose {axis} as a divisor of {size}"
            )


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces the batch axis is cut into."""
    return math.prod(mesh.shape[axis] for axis in DEFAULT_RULES.batch)


def batch_sharding(mesh: Mesh, ndim: int = 2, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """Sharding of a batch array [B, L, ...] (`ndim` 1: [B])."""
    return NamedSharding(mesh, rules.spec(("batch", "length", *[None] * (ndim - 2))[:ndim]))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(
    abstract_state: nnx.State, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> nnx.State:
    """A tree like `abstract_state` whose leaves are the `NamedSharding` of each parameter.

    Parameters name their axes in the metadata `logical_axes` (see `models.parameters.param`); a
    parameter without is replicated.
    """

    def sharding(variable):
        axes = variable.get_metadata().get("logical_axes")
        if axes is None:
            return variable.replace(replicated(mesh))
        return variable.replace(NamedSharding(mesh, rules.spec(axes)))

    return jax.tree.map(sharding, abstract_state, is_leaf=lambda x: isinstance(x, nnx.Variable))


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """Inside, `models.annotations.annotate` constrains activations to this mesh. None: no
    constraints.
    """
    if mesh is None or mesh.size == 1:
        yield
        return

    def fitting(shape: Sequence[int], axes: annotations.Axes) -> PartitionSpec:
        # A dimension that the mesh does not divide (a single prompt, say) stays whole.
        entries = zip(shape, rules.spec(axes), strict=True)
        return PartitionSpec(
            *(entry if dim % _size(mesh, entry) == 0 else None for dim, entry in entries)
        )

    def constrain(x: jax.Array, axes: annotations.Axes) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(x.shape, axes)))

    def per_device(fn, axes: Sequence[annotations.Axes], arrays, out_axes) -> Any:
        specs = tuple(fitting(x.shape, names) for x, names in zip(arrays, axes, strict=True))
        out_specs: Any = specs[0]
        if out_axes is not None:
            cut = {
                name: entry
                for names, spec in zip(axes, specs, strict=True)
                for name, entry in zip(names, spec, strict=True)
            }
            out_specs = tuple(
                PartitionSpec(*(None if name is None else cut[name] for name in names))
                for names in out_axes
            )
        # Kernels carry no information on what varies over the mesh, so it cannot be checked.
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)
        return mapped(*arrays)

    def mesh_axes(axis: str, size: int) -> tuple[str, ...]:
        entry = fitting((size,), (axis,))[0] or ()
        names = (entry,) if isinstance(entry, str) else entry
        return tuple(name for name in names if mesh.shape[name] > 1)

    with annotations.placed(annotations.Placement(constrain, per_device, mesh_axes)):
        yield


def _size(mesh: Mesh, entry: str | tuple[str, ...] | None) -> int:
    if entry is None:
        return 1
    return math.prod(mesh.shape[name] for name in ([entry] if isinstance(entry, str) else entry))


def init_decoder(
    config: DecoderConfig,
    execution: Execution = Execution(),
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Decoder:
    """A freshly initialised decoder, each device creating only its part of every parameter.

    The values depend on the seed alone, not on the mesh.
    """

    def create():
        return nnx.split(Decoder(config, execution, rngs=nnx.Rngs(seed)))

    if mesh is None:
        return nnx.merge(*create())
    check_divisible(config, mesh)
    graphdef, abstract = jax.eval_shape(create)
    shardings = param_shardings(abstract, mesh, rules)
    state = jax.jit(lambda: create()[1], out_shardings=shardings)()
    return nnx.merge(graphdef, state)
