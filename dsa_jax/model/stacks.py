"""Stacks of equal layers, as a pure function of the config."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from dsa_jax.config import LayerSpec, ModelConfig


class LayerStack(NamedTuple):
    """Consecutive layers of one `layer` specification, whose parameters share a leading layer axis.

    Fields: `name` of the stack in the parameter tree, `first_layer` its index in the model, `n_layers`, `layer`.
    """

    name: str
    first_layer: int
    n_layers: int
    layer: LayerSpec


def layer_stacks(config: ModelConfig) -> list[LayerStack]:
    """The maximal runs of equal layers, in order.

    A stack is called `dense_layers` or `moe_layers` after its MLP. When layers with that MLP form several runs, because other
    attention lies between, each run carries its first layer's index: `moe_layers_3`.
    """
    layers = config.layers()
    firsts = [i for i in range(config.n_layers) if i == 0 or layers[i] != layers[i - 1]]
    runs = [layers[first].mlp for first in firsts]
    stacks = []
    for first, end in zip(firsts, [*firsts[1:], config.n_layers], strict=True):
        mlp = layers[first].mlp
        name = f"{mlp}_layers" if runs.count(mlp) == 1 else f"{mlp}_layers_{first}"
        stacks.append(LayerStack(name, first, end - first, layers[first]))
    return stacks


def restacked(flat: Mapping[str, Any], source: Sequence[LayerStack], target: Sequence[LayerStack]) -> dict[str, Any]:
    """Parameters by path, from the stacks of one model to those of another with the same layers.

    Layers group differently where some of them share an indexer. A parameter that only some layers of a new stack have is left
    out, for it cannot be part of that stack.
    """
    layers: dict[int, dict[str, Any]] = {}
    others = dict(flat)
    for stack in source:
        for path in [path for path in others if path.startswith(f"{stack.name}/")]:
            leaf = others.pop(path)
            for i in range(stack.n_layers):
                layers.setdefault(stack.first_layer + i, {})[path.removeprefix(f"{stack.name}/")] = leaf[i]
    for stack in target:
        members = [layers[stack.first_layer + i] for i in range(stack.n_layers)]
        shared = [name for name in members[0] if all(name in member for member in members)]
        others |= {f"{stack.name}/{name}": jnp.stack([member[name] for member in members]) for name in shared}
    return others
