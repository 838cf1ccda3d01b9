"""Where the tensors of a checkpoint lie inside our fused, stacked parameters.

Torch linears are stored [out, in], one tensor a layer and projection; ours are stacked over layers
and fused (see docs/architecture.md). A naming scheme is a function from a configuration to `{tensor
name: pieces}`.
"""

import dataclasses
import math
from collections.abc import Callable

from olmax.models.config import DecoderConfig

# Dimension letters of every parameter, as in docs/architecture.md; C is the axis of fused
# projections.
PARAMETERS = {
    "embedder.embedding": "VD",
    "blocks.attention.qkv": "NDKCH",
    "blocks.attention.out": "NKGHD",
    "blocks.attention.q_norm.scale": "NKGH",
    "blocks.attention.k_norm.scale": "NKH",
    "blocks.attention_norm.scale": "ND",
    "blocks.mlp.gate_up": "NDCF",
    "blocks.mlp.down": "NFD",
    "blocks.mlp_norm.scale": "ND",
    "final_norm.scale": "D",
    "head.kernel": "DV",
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor, or some of its leading rows, as a part of one parameter.

    `dims` names the tensor's axes: a comma separates stored axes, several letters are one stored
    axis flattened. `fused` is the (start, size) it takes on the parameter's axis C.
    """

    param: str
    dims: str
    layer: int | None = None
    fused: tuple[int, int] = (0, 1)

    @property
    def axes(self) -> str:
        """The letters of `dims` in the tensor's order."""
        return self.dims.replace(",", "")


Layout = dict[str, tuple[Piece, ...]]
"""Pieces of every tensor, in the order in which they are concatenated along its first axis."""


def sizes(config: DecoderConfig) -> dict[str, int]:
    """Size of every dimension letter but C."""
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "N": config.n_layers,
        "K": config.n_kv_heads,
        "G": config.group_size,
        "H": config.head_dim,
        "F": config.d_ff,
    }


def piece_shape(piece: Piece, config: DecoderConfig) -> tuple[int, ...]:
    """Stored shape of one piece."""
    size = {**sizes(config), "C": piece.fused[1]}
    return tuple(math.prod(size[letter] for letter in group) for group in piece.dims.split(","))


def tensor_shape(pieces: tuple[Piece, ...], config: DecoderConfig) -> tuple[int, ...]:
    """Stored shape of a tensor: its pieces concatenated along the first axis."""
    shapes = [piece_shape(piece, config) for piece in pieces]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


# The fused projections of a layer, by what they are in a checkpoint.
def _q(config: DecoderConfig, layer: int) -> Piece:
    return Piece("blocks.attention.qkv", "KCH,D", layer, (0, config.group_size))


def _k(config: DecoderConfig, layer: int) -> Piece:
    return Piece("blocks.attention.qkv", "KH,D", layer, (config.group_size, 1))


def _v(config: DecoderConfig, layer: int) -> Piece:
    return Piece("blocks.attention.qkv", "KH,D", layer, (config.group_size + 1, 1))


def _gate(layer: int) -> Piece:
    return Piece("blocks.mlp.gate_up", "F,D", layer, (0, 1))


def _up(layer: int) -> Piece:
    return Piece("blocks.mlp.gate_up", "F,D", layer, (1, 1))


def huggingface(config: DecoderConfig) -> Layout:
    """Names of transformers' olmo2 (norms on outputs) and llama (norms on inputs)."""
    norms = {
        "output": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "input": ("input_layernorm", "post_attention_layernorm"),
    }
    attention_norm, mlp_norm = norms[config.norm_position]
    layout: Layout = {"model.embed_tokens.weight": (Piece("embedder.embedding", "V,D"),)}
    for n in range(config.n_layers):
        layer = {
            "self_attn.q_proj": _q(config, n),
            "self_attn.k_proj": _k(config, n),
            "self_attn.v_proj": _v(config, n),
            "self_attn.o_proj": Piece("blocks.attention.out", "D,KGH", n),
            attention_norm: Piece("blocks.attention_norm.scale", "D", n),
            "mlp.gate_proj": _gate(n),
            "mlp.up_proj": _up(n),
            "mlp.down_proj": Piece("blocks.mlp.down", "D,F", n),
            mlp_norm: Piece("blocks.mlp_norm.scale", "D", n),
        }
        if config.qk_norm == "full":
            layer["self_attn.q_norm"] = Piece("blocks.attention.q_norm.scale", "KGH", n)
            layer["self_attn.k_norm"] = Piece("blocks.attention.k_norm.scale", "KH", n)
        layout |= {f"model.layers.{n}.{name}.weight": (piece,) for name, piece in layer.items()}
    layout["model.norm.weight"] = (Piece("final_norm.scale", "D"),)
    if not config.tie_embeddings:
        layout["lm_head.weight"] = (Piece("head.kernel", "V,D"),)
    return layout


def olmo_trainer(config: DecoderConfig) -> Layout:
    """Names of github.com/allenai/OLMo: attention fused as [q; k; v], feed-forward as [up;
    gate].
    """
    layout: Layout = {"transformer.wte.weight": (Piece("embedder.embedding", "V,D"),)}
    for n in range(config.n_layers):
        layer: Layout = {
            "att_proj": (_q(config, n), _k(config, n), _v(config, n)),
            "attn_out": (Piece("blocks.attention.out", "D,KGH", n),),
            "attn_norm": (Piece("blocks.attention_norm.scale", "D", n),),
            "ff_proj": (_up(n), _gate(n)),
            "ff_out": (Piece("blocks.mlp.down", "D,F", n),),
            "ff_norm": (Piece("blocks.mlp_norm.scale", "D", n),),
        }
        if config.qk_norm == "full":
            layer["q_norm"] = (Piece("blocks.attention.q_norm.scale", "KGH", n),)
            layer["k_norm"] = (Piece("blocks.attention.k_norm.scale", "KH", n),)
        layout |= {
            f"transformer.blocks.{n}.{name}.weight": pieces for name, pieces in layer.items()
        }
    layout["transformer.ln_f.weight"] = (Piece("final_norm.scale", "D"),)
    if not config.tie_embeddings:
        layout["transformer.ff_out.weight"] = (Piece("head.kernel", "V,D"),)
    return layout


def olmo_core(config: DecoderConfig) -> Layout:
    """Names of github.com/allenai/OLMo-core: w1 is the gate, w2 down, w3 up; the final norm belongs
    to the head.
    """
    layout: Layout = {"embeddings.weight": (Piece("embedder.embedding", "V,D"),)}
    for n in range(config.n_layers):
        layer = {
            "attention.w_q": _q(config, n),
            "attention.w_k": _k(config, n),
            "attention.w_v": _v(config, n),
            "attention.w_out": Piece("blocks.attention.out", "D,KGH", n),
            "attention_norm": Piece("blocks.attention_norm.scale", "D", n),
            "feed_forward.w1": _gate(n),
            "feed_forward.w2": Piece("blocks.mlp.down", "D,F", n),
            "feed_forward.w3": _up(n),
            "feed_forward_norm": Piece("blocks.mlp_norm.scale", "D", n),
        }
        if config.qk_norm == "full":
            layer["attention.q_norm"] = Piece("blocks.attention.q_norm.scale", "KGH", n)
            layer["attention.k_norm"] = Piece("blocks.attention.k_norm.scale", "KH", n)
        layout |= {f"blocks.{n}.{name}.weight": (piece,) for name, piece in layer.items()}
    layout["lm_head.norm.weight"] = (Piece("final_norm.scale", "D"),)
    layout["lm_head.w_out.weight"] = (Piece("head.kernel", "V,D"),)
    return layout


LAYOUTS: dict[str, Callable[[DecoderConfig], Layout]] = {
    "huggingface": huggingface,
    "olmo_trainer": olmo_trainer,
    "olmo_core": olmo_core,
}
