"""Stage stability: how activations and gradients grow over depth at initialisation.

Paper section 3.2: OLMo 2's initialisation (the same truncated normal everywhere) against the scaled
one of OLMo-0424, at several widths, on random documents; the exponent nearer to zero is the better.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from experiments.olmo2.preparation import data_directory
from experiments.olmo2.recipe import Recipe
from experiments.stages import Stages
from olmax.data.prepared import open_prepared
from olmax.models.decoder import Decoder
from olmax.reporting.document import Block, TableBlock, Text
from olmax.reporting.files import write_json
from olmax.reporting.tables import Column, Table
from olmax.training.stability import growth_exponents

TITLE = "Initialisation"
DIRECTORY = "stability"
INITS = {"normal": "OLMo 2", "scaled": "OLMo-0424"}


def run(recipe: Recipe, directory: pathlib.Path, stages: Stages, console: Console) -> None:
    """Measures the growth exponents; results in `stability/results.json`."""
    results = f"{DIRECTORY}/results.json"
    settings = {"stability": recipe.stability, "model": recipe.pretrain.model}
    with stages.run("stability", settings, after=["prepare"], outputs=[results]) as wanted:
        if wanted:
            write_json(directory / results, _measure(recipe, directory, console))
    console.print(_table(json.loads((directory / results).read_text())).rich())


def _measure(recipe: Recipe, directory: pathlib.Path, console: Console) -> dict[str, Any]:
    study = recipe.stability
    source = open_prepared(data_directory(recipe, recipe.pretrain_mix, directory))[0]
    rng = np.random.default_rng(study.seed)
    chosen = rng.choice(len(source), size=min(study.documents, len(source)), replace=False)
    tokens_BL = jnp.asarray(source.read([int(i) for i in chosen]), jnp.int32)
    rows = []
    for width in study.widths:
        for init in INITS:
            head_dim = min(32, width // 2)
            config = dataclasses.replace(
                recipe.pretrain.model,
                d_model=width,
                n_layers=study.layers,
                n_heads=width // head_dim,
                n_kv_heads=width // head_dim,
                head_dim=head_dim,
                d_ff=4 * width,
                init=init,
                # Each initialisation with the block it was used in: OLMo-0424 normed the inputs.
                norm_position="output" if init == "normal" else "input",
                qk_norm="full" if init == "normal" else "none",
            )
            model = Decoder(config, rngs=nnx.Rngs(study.seed))
            found = growth_exponents(model, tokens_BL)
            console.print(
                f"width {width}, {INITS[init]}: activations {found.activations:+.4f}, "
                f"gradients {found.gradients:+.4f}",
                highlight=False,
            )
            rows.append({"width": width, "init": init, **found._asdict()})
    return {"layers": study.layers, "documents": len(chosen), "rows": rows}


def blocks(study: Mapping[str, Any]) -> list[Block]:
    """The study as part of a report."""
    nearer = {
        kind: sum(
            abs(_value(study, width, "normal", kind)) < abs(_value(study, width, "scaled", kind))
            for width in _widths(study)
        )
        for kind in ("activations", "gradients")
    }
    count = len(_widths(study))
    return [
        Text(
            f"At {nearer['activations']} of {count} widths the exponent of activations is nearer "
            f"to zero with OLMo 2's initialisation and block than with OLMo-0424's, at "
            f"{nearer['gradients']} of {count} that of gradients. The paper finds OLMo 2's nearer "
            "at every width. One initialisation each; no standard error."
        ),
        TableBlock(_table(study)),
    ]


def _widths(study: Mapping[str, Any]) -> list[int]:
    return list(dict.fromkeys(row["width"] for row in study["rows"]))


def _value(study: Mapping[str, Any], width: int, init: str, kind: str) -> float:
    return next(r[kind] for r in study["rows"] if r["width"] == width and r["init"] == init)


def _table(study: Mapping[str, Any]) -> Table:
    rows = [
        [str(width), *(_value(study, width, init, kind)
                       for kind in ("activations", "gradients") for init in INITS)]
        for width in _widths(study)
    ]  # fmt: skip
    columns = [
        "width",
        *(
            Column(f"{kind}, {name}", 4, signed=True)
            for kind in ("activations", "gradients")
            for name in INITS.values()
        ),
    ]
    caption = (
        f"ln(|v'| / |v|) / {study['layers']} layers over {study['documents']} random documents, "
        "from the first layer's output to the last one's; 0 is no growth."
    )
    return Table(columns, rows, title="Growth exponents at initialisation", caption=caption)
