"""The record of an attention kind: everything that the rest of the package asks of one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from jaxtyping import Array, Float, Int

from dsa_jax.config import AttentionConfig, LayerSpec, ModelConfig
from dsa_jax.config.attention import KindFields
from dsa_jax.config.selections import Selection
from dsa_jax.costs.kinds import KindCosts
from dsa_jax.model.attention.cache import CacheEntry, LayerCache
from dsa_jax.model.outputs import AttentionRequest
from pallas_kernels import IndexHeads

MODEL, INDEXER = "model", "indexer"
"""Values of `Parameter.learns`: from the language model's loss under every attention, or from the indexer's KL."""


class Parameter(NamedTuple):
    """One parameter of an attention layer.

    Fields:
        path: below the layer's `attention/`, such as "wq/kernel".
        split: the mesh axis of each axis of one layer's array; () replicates it.
        tensor: its name in a Hugging Face checkpoint below `model.layers.N.`; "" where no published format has it.
        learns: `MODEL`, `INDEXER`, or the name of the one attention mode under whose loss it is trained.
        is_float32: kept in float32 in a checkpoint, whatever the dtype of the others.
    """

    path: str
    split: tuple[str | None, ...]
    tensor: str = ""
    learns: str = MODEL
    is_float32: bool = False


class Heads(NamedTuple):
    """Projected queries, keys and values of one attention layer; `v` None: values are the first d_v channels of the keys."""

    q: Float[Array, "B T H D"]
    k: Float[Array, "B S G D"]
    v: Float[Array, "B S G Dv"] | None
    d_v: int | None


class AttentionParts(NamedTuple):
    """One layer's heads for all visible keys, its index heads (None without an indexer) and its softmax scale."""

    heads: Heads
    index_heads: IndexHeads | None
    softmax_scale: float


class AttentionOutput(NamedTuple):
    """Output of one attention layer (or of its core, before the output projection) and its measurements."""

    out: Float[Array, "..."]
    topk_indices: Int[Array, "B T K"] | None
    indexer_kl: Float[Array, ""] | None
    coverage: Float[Array, ""] | None
    keys_per_query: Float[Array, ""]
    index_heads: IndexHeads | None = None
    indexer_recall: Float[Array, ""] | None = None


class CachedAttentionOutput(NamedTuple):
    """Output of one attention layer (or of its core) over a cache, the selection it used and the cache it wrote to."""

    out: Float[Array, "..."]
    topk_indices: Int[Array, "B T K"] | None
    cache: LayerCache


def _no_limits(request: AttentionRequest, *, return_topk_indices: bool, cached: bool) -> None:
    del request, return_topk_indices, cached


class AttentionKind(NamedTuple):
    """An attention kind. Every kind answers "dense" and all selection rules; `modes` it answers alone.

    The module that `build` returns is called with (x, LayerContext, AttentionRequest) and gives an `AttentionOutput`; its
    `extend` takes (x, LayerContext, LayerCache, AttentionRequest) and gives a `CachedAttentionOutput`; its `parts` takes
    (x, positions) and gives `AttentionParts`; its `touch` takes the same and uses every parameter, so that they can be made
    without tracing an attention.

    Fields:
        fields: name, config fields and their check; no JAX in it.
        build: the module of one layer.
        parameters: rows for sharding, freezing and Hugging Face names; the indexer's are common to all kinds.
        cache_entries: arrays that a token leaves in the cache of a layer, by name; index keys not included.
        costs: FLOPs per query and key, and the sizes of the heads.
        split_heads: config fields that count heads which the `tensor` axis splits, with their values.
        modes: rows of the attention modes that it alone answers.
        check_mode: raises for a request in a mode of its own that it cannot compute.
        turned: parameters by path, and those with which a model that was trained under another attention turns to `modes`.
    """

    fields: KindFields
    build: Callable[[ModelConfig, LayerSpec], nn.Module]
    parameters: tuple[Parameter, ...]
    cache_entries: Callable[[AttentionConfig], dict[str, CacheEntry]]
    costs: Callable[[AttentionConfig], KindCosts]
    split_heads: Callable[[AttentionConfig], dict[str, int]]
    modes: tuple[Selection, ...] = ()
    check_mode: Callable[..., None] = _no_limits
    turned: Callable[[Mapping[str, Any]], dict[str, Any]] = dict

    @property
    def name(self) -> str:
        """The value of `model.attention.kind`."""
        return self.fields.name
