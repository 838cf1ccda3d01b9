"""Checkpoints that hold a model and nothing of its training."""

import dataclasses
import os

import orbax.checkpoint as ocp
from flax import nnx

from olmax.interop.output_directory import new_directory
from olmax.interop.tokenizer_files import TokenizerLike, copy_tokenizer
from olmax.models.config import DecoderConfig
from olmax.models.decoder import Decoder
from olmax.training import checkpoint_files as files
from olmax.training import config_json
from olmax.training.checksums import checksums
from olmax.training.names import named_leaves


@dataclasses.dataclass(frozen=True)
class ModelOnly:
    """The configuration stored with such a checkpoint, in place of a training configuration."""

    model: DecoderConfig


def save_model(
    model: Decoder, path: str | os.PathLike, *, tokenizer: TokenizerLike | None = None
) -> None:
    """Writes a checkpoint that `checkpoints.restore_model` reads, from one process.

    Args:
      model: a decoder; parameters keep their dtype.
      path: the directory to create; it appears, complete, at the end.
      tokenizer: a `tokenizer.json`, its directory or a tokenizer object, copied into `path`.

    Raises:
      UserError: the directory exists and is not empty, or it cannot be written.
    """
    leaves = named_leaves(nnx.state(model, nnx.Param))
    arrays = {f"params.{name}": leaf for name, leaf in leaves.items()}
    sums = checksums(arrays)
    described = {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "checksum": int(sums[name])}
        for name, x in arrays.items()
    }
    with new_directory(path) as directory:
        config_json.dump(ModelOnly(model.config), directory / files.CONFIG)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, directory, vocab_size=model.config.vocab_size)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as writer:
            writer.save(directory / files.STATE, args=ocp.args.PyTreeSave(arrays))
        files.write_metadata(directory, files.Metadata(0, True, described))
