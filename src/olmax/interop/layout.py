"""Where the tensors of a checkpoint lie inside our fused, stacked parameters.

Torch linears are stored [out, in], one tensor a layer and projection; ours are stacked over layers
and fused (see docs/architecture.md). A naming scheme is a function from a configuration to `{tensor
name: pieces}`.
"""

import dataclasses
import math
from collections.abc import Callable, Container

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
    "blocks.moe.router": "NDE",
    "blocks.moe.gate_up": "NECDF",
    "blocks.moe.down": "NEFD",
    "blocks.moe.shared.gate_up": "NDCF",
    "blocks.moe.shared.down": "NFD",
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
    expert: int | None = None
    """The one expert it belongs to; None: all of them, or none."""
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
        "E": 1 if config.moe is None else config.moe.n_experts,
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
    return Piece("blocks.attention.qkv", "KCH,D", layer, fused=(0, config.group_size))


def _k(config: DecoderConfig, layer: int) -> Piece:
    return Piece("blocks.attention.qkv", "KH,D", layer, fused=(config.group_size, 1))


def _v(config: DecoderConfig, layer: int) -> Piece:
    return Piece("blocks.attention.qkv", "KH,D", layer, fused=(config.group_size + 1, 1))


def _gate(layer: int) -> Piece:
    return Piece("blocks.mlp.gate_up", "F,D", layer, fused=(0, 1))


def _up(layer: int) -> Piece:
    return Piece("blocks.mlp.gate_up", "F,D", layer, fused=(1, 1))


def _feed_forward(config: DecoderConfig, layer: int) -> dict[str, Piece]:
    """transformers' names inside a layer: one gate, up and down, or those of every expert."""
    if config.moe is None:
        return {
            "mlp.gate_proj": _gate(layer),
            "mlp.up_proj": _up(layer),
            "mlp.down_proj": Piece("blocks.mlp.down", "D,F", layer),
        }
    found = {"mlp.gate": Piece("blocks.moe.router", "E,D", layer)}
    for e in range(config.moe.n_experts):
        found |= {
            f"mlp.experts.{e}.gate_proj": Piece("blocks.moe.gate_up", "F,D", layer, e, (0, 1)),
            f"mlp.experts.{e}.up_proj": Piece("blocks.moe.gate_up", "F,D", layer, e, (1, 1)),
            f"mlp.experts.{e}.down_proj": Piece("blocks.moe.down", "D,F", layer, e),
        }
    return found


def huggingface(config: DecoderConfig) -> Layout:
    """Names of transformers' olmo2 (norms on outputs), llama (norms on inputs) and olmoe (the same
    with QK-norm and experts).
    """
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
            **_feed_forward(config, n),
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


def huggingface_packed(config: DecoderConfig) -> Layout:
    """The same with the experts of a layer in two tensors, as transformers 5 holds them in memory
    and some tools store them.
    """
    layout = {n: p for n, p in huggingface(config).items() if ".mlp.experts." not in n}
    for n in range(config.n_layers):
        experts = f"model.layers.{n}.mlp.experts."
        layout[experts + "gate_up_proj"] = (Piece("blocks.moe.gate_up", "E,CF,D", n, fused=(0, 2)),)
        layout[experts + "down_proj"] = (Piece("blocks.moe.down", "E,D,F", n),)
    return layout


def is_packed(names: Container[str]) -> bool:
    """Whether a checkpoint with these tensors has them named as `huggingface_packed` does."""
    return "model.layers.0.mlp.experts.gate_up_proj" in names


def olmo_trainer(config: DecoderConfig) -> Layout:
    """Names of github.com/allenai/OLMo: attention fused as [q; k; v], feed-forward as [up; gate].

    With experts those of its branch that trained OLMoE: w1 (gate), v1 (up) and w2 (down, stored
    transposed) of all experts one after the other.
    """
    layout: Layout = {"transformer.wte.weight": (Piece("embedder.embedding", "V,D"),)}
    for n in range(config.n_layers):
        layer: Layout = {
            "att_proj": (_q(config, n), _k(config, n), _v(config, n)),
            "attn_out": (Piece("blocks.attention.out", "D,KGH", n),),
            "attn_norm": (Piece("blocks.attention_norm.scale", "D", n),),
            "ff_norm": (Piece("blocks.mlp_norm.scale", "D", n),),
        }
        if config.moe is None:
            layer |= {
                "ff_proj": (_up(n), _gate(n)),
                "ff_out": (Piece("blocks.mlp.down", "D,F", n),),
            }
        else:
            layer["ffn.router.layer"] = (Piece("blocks.moe.router", "E,D", n),)
        if config.qk_norm == "full":
            layer["q_norm"] = (Piece("blocks.attention.q_norm.scale", "KGH", n),)
            layer["k_norm"] = (Piece("blocks.attention.k_norm.scale", "KH", n),)
        layout |= {
            f"transformer.blocks.{n}.{name}.weight": pieces for name, pieces in layer.items()
        }
        if config.moe is not None:
            experts = f"transformer.blocks.{n}.ffn.experts.mlp."
            layout |= {
                experts + "w1": (Piece("blocks.moe.gate_up", "EF,D", n, fused=(0, 1)),),
                experts + "v1": (Piece("blocks.moe.gate_up", "EF,D", n, fused=(1, 1)),),
                experts + "w2": (Piece("blocks.moe.down", "EF,D", n),),
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
    "huggingface_packed": huggingface_packed,
    "olmo_trainer": olmo_trainer,
    "olmo_core": olmo_core,
}
