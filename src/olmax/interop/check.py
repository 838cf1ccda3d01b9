"""Whether the tensors of a checkpoint are those its configuration asks for."""

import re
from collections.abc import Iterator

import numpy as np

from olmax.errors import UserError
from olmax.interop import layout
from olmax.interop.layout import Layout
from olmax.interop.tensor_files import TensorFiles
from olmax.models.config import DecoderConfig
from olmax.models.rope import inverse_frequencies

_ROTARY_BUFFER = re.compile(r"(.*\.)?rotary_emb\.inv_freq$")

# Head and embedding of each naming scheme: a tied checkpoint may hold both.
_TIED = {
    "lm_head.weight": "model.embed_tokens.weight",
    "transformer.ff_out.weight": "transformer.wte.weight",
}


def check_tensors(files: TensorFiles, names: Layout, config: DecoderConfig) -> None:
    """Checks that the files hold exactly the tensors that the model needs, in their shapes.

    Raises:
      UserError: one for all that is missing, surplus and misshapen, with the first few names.
    """
    problems: dict[str, list[str]] = {"missing": [], "misshapen": []}
    for name, pieces in names.items():
        info = files.infos.get(name)
        shape = layout.tensor_shape(pieces, config)
        if info is None:
            problems["missing"].append(name)
        elif info.shape != shape:
            problems["misshapen"].append(f"{name} {list(info.shape)} instead of {list(shape)}")
    problems["surplus"] = [
        name for name in files.infos if name not in names and not _redundant(files, name, config)
    ]
    found = [f"{kind}: {_some(listed)}" for kind, listed in problems.items() if listed]
    if found:
        raise UserError(f"{files.index}: does not fit its configuration; {'; '.join(found)}")


def _some(listed: list[str]) -> str:
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _redundant(files: TensorFiles, name: str, config: DecoderConfig) -> bool:
    """Whether a surplus tensor only repeats what the model has; one that should and does not is an
    error.
    """
    info = files.infos[name]
    if _ROTARY_BUFFER.match(name):
        # Old transformers saved the RoPE frequencies, sometimes in half precision.
        if not _holds_frequencies(files, name, config):
            raise UserError(
                f"{info.file}: {name} holds other frequencies than rope_theta={config.rope_theta:g}"
                " of the configuration gives"
            )
        return True
    embedding = _TIED.get(name)
    if config.tie_embeddings and embedding in files.infos:
        if not all(same for same in _compare(files, name, embedding)):
            raise UserError(
                f"{info.file}: {name} differs from {embedding} although the configuration ties "
                "them; set tie_word_embeddings (weight_tying) to false, or remove the tensor"
            )
        return True
    return False


def _holds_frequencies(files: TensorFiles, name: str, config: DecoderConfig) -> bool:
    scaled = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    unscaled = inverse_frequencies(config.head_dim, config.rope_theta)
    if files.infos[name].shape != scaled.shape:
        return False
    stored = files.read_rows(name, 0, len(scaled)).astype(np.float32)
    return any(np.allclose(stored, good, rtol=1e-2, atol=1e-7) for good in (scaled, unscaled))


def _compare(files: TensorFiles, a: str, b: str) -> Iterator[bool]:
    """Whether two tensors are bit for bit the same, block by block."""
    shape, dtype = files.infos[a].shape, files.infos[a].dtype
    if (shape, dtype) != (files.infos[b].shape, files.infos[b].dtype):
        yield False
        return
    for row, block in files.blocks(a, 0, shape[0]):
        yield block.tobytes() == files.read_rows(b, row, row + len(block)).tobytes()
