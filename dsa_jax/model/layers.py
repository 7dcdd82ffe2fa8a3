"""How the layers of a model group into stacks of one kind, as a pure function of the config."""

from typing import NamedTuple

from dsa_jax.config import ModelConfig


class LayerStack(NamedTuple):
    """Consecutive layers of one kind, whose parameters share a leading layer axis.

    Fields: `name` of the stack in the parameter tree; `mlp` "dense" or "moe"; `indexer` "full", "shared" or "none".
    """

    name: str
    first_layer: int
    n_layers: int
    mlp: str
    indexer: str


def layer_stacks(config: ModelConfig) -> list[LayerStack]:
    """The maximal runs of layers of one kind, in order.

    A stack is called `dense_layers` or `moe_layers` after its MLP. When layers with that MLP form several runs, because
    layers with their own indexer alternate with layers that share, each run carries its first layer's index: `moe_layers_3`.
    """
    kinds = [(_mlp_kind(config, i), _indexer_kind(config, i)) for i in range(config.n_layers)]
    firsts = [i for i in range(config.n_layers) if i == 0 or kinds[i] != kinds[i - 1]]
    runs = [kinds[first][0] for first in firsts]
    stacks = []
    for first, end in zip(firsts, [*firsts[1:], config.n_layers], strict=True):
        mlp, indexer = kinds[first]
        name = f"{mlp}_layers" if runs.count(mlp) == 1 else f"{mlp}_layers_{first}"
        stacks.append(LayerStack(name, first, end - first, mlp, indexer))
    return stacks


def _mlp_kind(config: ModelConfig, layer: int) -> str:
    return "moe" if config.moe.n_routed_experts and layer >= config.moe.n_dense_layers else "dense"


def _indexer_kind(config: ModelConfig, layer: int) -> str:
    indexer = config.attention.indexer
    if not indexer.enabled:
        return "none"
    return indexer.layer_types[layer] if indexer.layer_types else "full"
