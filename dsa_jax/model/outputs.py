"""Requests to a forward pass and its results."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from dsa_jax.config.selections import DENSE, is_by_indexer, selection
from dsa_jax.model.attention.cache import Cache
from dsa_jax.model.attention.health import SelectionHealth
from pallas_kernels import IndexHeads, Visible


@dataclass(frozen=True)
class AttentionRequest:
    """The part of a forward pass that every attention layer sees; static, so it may steer Python control flow under jit.

    Fields: `attention` one of `dsa_jax.config.selections`; `indexer_loss` None, "dense" (KL over all visible keys) or "sparse"
    (over the selection); `coverage` whether to measure the share of dense attention mass that the selection holds, and of the
    indexer's top-k keys where these are not the selection.
    """

    attention: str = DENSE
    indexer_loss: str | None = None
    coverage: bool = False

    @property
    def selects(self) -> bool:
        """Whether a query attends to some of its visible keys only."""
        return self.attention != DENSE

    @property
    def by_indexer(self) -> bool:
        """Whether the indexer's scores choose the keys."""
        return is_by_indexer(self.attention)

    @property
    def measures_health(self) -> bool:
        """Whether the selection is measured beyond its coverage."""
        return self.coverage and self.has_topk_indices

    @property
    def has_topk_indices(self) -> bool:
        """Whether one selection of keys per query serves all heads, which attention modes of a single kind need not have."""
        return self.selects and not selection(self.attention).kind


class LayerContext(NamedTuple):
    """The arrays beside the hidden state that a layer gets.

    Fields: `positions` for the rotary embedding; `visible` ranges of keys, empty for padding; `previous_topk` the selection of
    the last full layer, which a sharing layer reuses; `served_by` the index heads it came from, where their loss is to be
    measured in the sharing layer, too.
    """

    positions: Int[Array, "B T"]
    visible: Visible
    previous_topk: Int[Array, "B T K"] | None = None
    served_by: IndexHeads | None = None


class MoEStatistics(NamedTuple):
    """Load of the experts, over valid tokens only. Stacked over the MoE layers in a `ModelOutput`.

    Fields: `expert_counts` float32 [.., n_experts], tokens sent to each expert; `balance_loss` float32 [..], the sequence-wise
    loss before its weight.
    """

    expert_counts: Float[Array, "*L X"]
    balance_loss: Float[Array, "*L"]


class LayerStatistics(NamedTuple):
    """Measurements of one layer; all float32 scalars except `topk_indices`, `moe` and `index_heads`.

    Between layers a selection has min(topk, S) slots: a budget beyond the S keys there are costs nothing.

    `index_heads` are those of its own indexer, for the layers that share it; they are never stacked over layers.
    """

    indexer_kl: Float[Array, "*L"] | None
    coverage: Float[Array, "*L"] | None
    keys_per_query: Float[Array, "*L"]
    topk_indices: Int[Array, "*L B T K"] | None
    moe: MoEStatistics | None
    index_heads: IndexHeads | None = None
    indexer_recall: Float[Array, "*L"] | None = None
    health: SelectionHealth | None = None


class ModelOutput(NamedTuple):
    """The result of a forward pass. What was not asked for is None.

    Fields:
        logits: float32 [B, T, V].
        hidden: [B, T, E] after the final norm; `unembed` turns it into logits.
        indexer_kl: float32 [n_layers], mean over valid query rows, nats; 0 for a layer without an indexer of its own. Where an
            indexer learns from the layers that share it, the mean over them and its own.
        topk_indices: int32 [n_layers, B, T, topk], canonical; a sharing layer repeats what it reuses.
        coverage: float32 [n_layers], mean over valid queries and heads of the dense attention probability held by the attended
            keys; 1 for dense attention; of a mode of one kind, as its file says.
        keys_per_query: float32 [n_layers], mean number of keys attended to per valid query.
        moe: `MoEStatistics` stacked over the MoE layers; None in a model without any.
        indexer_recall: float32 [n_layers], where blocks were chosen ("coarse_to_fine", "blocks") and coverage measured: the
            share of the layer's own top-k keys that the selection holds, mean over valid queries; nan in a layer that shares.
        health: `SelectionHealth` by layer, where one selection serves all heads and coverage is measured.
    """

    logits: Float[Array, "B T V"] | None
    hidden: Float[Array, "B T E"] | None
    indexer_kl: Float[Array, " L"] | None
    topk_indices: Int[Array, "L B T K"] | None
    coverage: Float[Array, " L"] | None
    keys_per_query: Float[Array, " L"]
    moe: MoEStatistics | None
    indexer_recall: Float[Array, " L"] | None = None
    health: SelectionHealth | None = None


class ExtendOutput(NamedTuple):
    """The result of appending tokens to a cache. What was not asked for is None.

    Fields:
        logits: float32 [B, V] after the last new token of each row; without meaning for a row that got none.
        all_logits: float32 [B, T, V]; without meaning at padding.
        topk_indices: int32 [n_layers, B, T, topk] positions within the row, canonical, -1 throughout at padding.
        cache: holds the new tokens.
    """

    logits: Float[Array, "B V"]
    all_logits: Float[Array, "B T V"] | None
    topk_indices: Int[Array, "L B T K"] | None
    cache: Cache
