"""Checkpoints of other code bases -> `Decoder`, streamed into their sharding."""

import dataclasses
import os

from flax import nnx
from jax.sharding import Mesh, Sharding
from tqdm import tqdm

from olmax.interop import hf_config, layout, olmo_config, source
from olmax.interop.assembly import Assembly
from olmax.interop.check import check_tensors
from olmax.interop.tensor_files import TensorFiles
from olmax.models.config import DecoderConfig, Execution
from olmax.models.decoder import Decoder
from olmax.sharding import check_divisible, param_shardings


def load_config(path: str | os.PathLike) -> DecoderConfig:
    """The architecture of a Hugging Face, old-trainer or OLMo-core checkpoint.

    Raises:
      UserError: no such checkpoint, or an unsupported configuration.
    """
    return read_config(source.resolve(path))


def stored_dtype(path: str | os.PathLike) -> str | None:
    """The dtype in which such a checkpoint is stored; None if its tensors differ."""
    with TensorFiles(source.resolve(path).directory) as files:
        return files.dtype


def read_config(found: source.Source) -> DecoderConfig:
    """The architecture of a resolved source."""
    readers = {
        "huggingface": hf_config.from_huggingface,
        "olmo_trainer": olmo_config.from_olmo_trainer,
        "olmo_core": olmo_config.from_olmo_core,
    }
    values = source.read_mapping(found.config_file)
    return readers[found.kind](values, str(found.config_file))


def load_model(
    path: str | os.PathLike,
    *,
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
    execution: Execution | None = None,
) -> Decoder:
    """A model from a checkpoint of Hugging Face, the old OLMo trainer or OLMo-core.

    Host memory stays within the model in `param_dtype` (on the devices' own memory where they have
    one) plus a few blocks of `tensor_files.BLOCK_BYTES`. With a mesh each device receives its part
    only, and a host reads only the rows that its devices need.

    Args:
      path: directory, remote directory (gs://...) or hub id (`owner/name`, `owner/name@revision`).
      param_dtype: dtype of the parameters.
      compute_dtype: dtype of matrix products.
      mesh: where to put the parameters; None: the default device.
      execution: how to run the model; its dtypes are replaced by the two above.

    Raises:
      UserError: unsupported configuration; missing, surplus or misshapen tensors; damaged files; a
        mesh that does not divide the model.
    """
    found = source.resolve(path)
    config = read_config(found)
    execution = dataclasses.replace(
        execution or Execution(), param_dtype=param_dtype, compute_dtype=compute_dtype
    )
    if mesh is not None:
        check_divisible(config, mesh)
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, execution, rngs=nnx.Rngs(0)))
    )
    shardings: dict[str, Sharding | None] = {}
    if mesh is not None:
        shardings = {
            _dotted(path): leaf.get_value()
            for path, leaf in nnx.to_flat_state(param_shardings(abstract, mesh))
        }
    with TensorFiles(found.directory) as files:
        packed = "_packed" if layout.is_packed(files.infos) else ""
        names = layout.LAYOUTS[found.kind + packed](config)
        check_tensors(files, names, config)
        assembly = Assembly(config, param_dtype, shardings)
        for name, pieces in tqdm(
            names.items(), desc="loading", unit="tensor", delay=3, leave=False, disable=None
        ):
            row = 0
            for piece in pieces:
                assembly.write(files, name, row, piece)
                row += layout.piece_shape(piece, config)[0]
    leaves = [
        (path, leaf.replace(assembly.finish(_dotted(path))))
        for path, leaf in nnx.to_flat_state(abstract)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
