"""Dotted names of the arrays in a tree, as in docs/architecture.md: `blocks.attention.qkv`."""

from collections.abc import Callable
from typing import Any

import jax


def _name(path) -> str:
    # NNX variables are tree nodes that add a last `value`; it says nothing.
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by their dotted names, in the tree's order."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree like `tree` with `fn(name, leaf)` at its leaves."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(_name(path), leaf), tree)
