"""Choose keys and attend to them, over the arrays of whole rows or over a cache, and measure the indexer against attention."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsa_jax.config import AttentionConfig
from dsa_jax.config.selections import SPARSE
from dsa_jax.model.attention.base import AttentionOutput, CachedAttentionOutput, Heads
from dsa_jax.model.attention.cache import INDEX_KEYS, LayerCache
from dsa_jax.model.attention.coarse_loss import coarse_kl
from dsa_jax.model.attention.selection import Choice, Target, choose, implementations_of, rule_of, share_held
from dsa_jax.model.attention.visibility import mean_over_valid
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from dsa_jax.parallel.ambient import ROWS, axis_if_split, mean_over, per_device
from dsa_jax.parallel.sequence import HEADS, gather_heads, gather_keys, key_spec
from pallas_kernels import IndexHeads, SparseAttentionOutput, dense_attention, indexer_kl, sparse_attention

TOPK_NAME = "topk_indices"
"""Name under which rematerialisation saves the selection."""


class Attention(NamedTuple):
    """The static part of a call: the config, the softmax scale and the request."""

    config: AttentionConfig
    softmax_scale: float
    request: AttentionRequest


class PerQuery(NamedTuple):
    """Results by query, None where not asked for: `out` [B, T, H, Dv], `topk_indices` [B, T, min(topk, S)], others [B, T]."""

    out: Any
    n_keys: Any
    topk_indices: Any = None
    indexer_kl: Any = None
    coverage: Any = None
    indexer_recall: Any = None


def needs_dense_heads(request: AttentionRequest, *, has_index: bool) -> bool:
    """Whether a pass of dense attention is part of the answer; `has_index`: there are index heads to measure against it."""
    if not request.selects:
        return True
    return request.coverage or (request.indexer_loss == "dense" and has_index) or rule_of(request.attention).needs_target


def needs_indexer(request: AttentionRequest) -> bool:
    """Whether an indexer has anything to do: to select, or to be trained."""
    return request.by_indexer or request.indexer_loss is not None


def measures_indexer_recall(request: AttentionRequest) -> bool:
    """Whether a selection that the indexer chooses otherwise than key by key is compared with its top-k keys."""
    return request.coverage and request.by_indexer and request.attention != SPARSE


def attend(
    call: Attention, dense: Heads | None, selected: Heads | None, index: IndexHeads | None, context: LayerContext
) -> AttentionOutput:
    """Attention over whole rows, in the form of heads that suits it.

    On a mesh each device takes its rows, its heads and its positions; keys are gathered along `context`, the indexer is the
    same on all devices of `tensor`.

    Args:
        call: the config, the softmax scale and the request.
        dense: heads for attention to all visible keys; needed where `needs_dense_heads` says so.
        selected: heads for attention to a selection; needed unless the request is dense.
        index: this layer's indexer; None for a layer that has none or shares.
        context: of the layer.

    Returns:
        `out` [B, T, H, Dv] in the form of the heads used. A padding query gives 0.
    """
    request = call.request

    def core(dense_arrays: Any, selected_arrays: Any, index: IndexHeads | None, context: LayerContext) -> PerQuery:
        return choose_and_attend(
            call,
            dense and _with_all_keys(dense_arrays, dense.d_v),
            selected and _with_all_keys(selected_arrays, selected.d_v),
            index and index._replace(k=gather_keys(index.k)),
            context._replace(served_by=context.served_by and context.served_by._replace(k=gather_keys(context.served_by.k))),
            has_shared_keys=selected is not None and selected.k.shape[2] == 1,
        )

    results = PerQuery(
        out=HEADS,
        n_keys=ROWS,
        topk_indices=ROWS if request.selects else None,
        indexer_kl=None if request.indexer_loss is None else ROWS,
        coverage=ROWS if request.coverage else None,
        indexer_recall=ROWS if measures_indexer_recall(request) else None,
    )
    # The static width of the values is no array, so it stays behind.
    arrays = [heads and heads._replace(d_v=None) for heads in (dense, selected)]
    specs = [heads and Heads._make([HEADS, *(x if x is None else key_spec(x) for x in heads[1:])]) for heads in arrays]
    per_query = per_device(core, in_specs=(*specs, ROWS, ROWS), out_specs=results)(*arrays, index, context)
    mean = lambda x: None if x is None else mean_over_valid(x, context.visible.some)
    return AttentionOutput(
        out=per_query.out,
        topk_indices=per_query.topk_indices,
        indexer_kl=mean(per_query.indexer_kl),
        coverage=mean(per_query.coverage),
        keys_per_query=mean_over_valid(per_query.n_keys, context.visible.some),
        index_heads=index,
        indexer_recall=mean(per_query.indexer_recall),
    )


class CachedKeys(NamedTuple):
    """Names of the cache entries with a layer's keys and values; `values` None: the first `d_v` channels of the keys."""

    keys: str
    values: str | None = None
    d_v: int | None = None


def attend_cached(
    call: Attention,
    q: Float[Array, "B T H D"],
    index: IndexHeads | None,
    context: LayerContext,
    cache: LayerCache,
    names: CachedKeys,
) -> CachedAttentionOutput:
    """The result of `attend` for the same tokens, with keys and values from the cache.

    A selection is gathered token by token where that moves fewer of them than reading the whole cache: T * topk <= S.

    Args:
        call: the config, the softmax scale and the request.
        q: queries of the new tokens, whose keys and values the cache already holds.
        index: this layer's indexer on the new tokens; its keys are read from the cache. None for a layer without one.
        context: of the layer; ranges and selections are positions within the row.
        cache: with the new tokens written.
        names: of the entries.
    """
    # The whole cache. XLA drops whatever of this the chosen mode does not use.
    values = None if names.values is None else cache.read(names.values, q.dtype)
    heads = Heads(q, _as_heads(cache.read(names.keys, q.dtype)), values, names.d_v)
    if index is not None:
        index = index._replace(k=cache.read(INDEX_KEYS, index.q.dtype))

    def attend_gathered(indices: Int[Array, "B T K"], **settings: Any) -> SparseAttentionOutput:
        topk = indices.shape[-1]
        if q.shape[1] * topk > cache.capacity:
            return sparse_attention(heads.q, heads.k, heads.v, indices, **settings)

        def gathered(name: str) -> Float[Array, "N K G D"]:
            return _as_heads(cache.gather(name, indices, q.dtype).reshape(-1, topk, *cache.entries[name].shape))

        # Every query becomes a row of its own, whose keys are the topk that were gathered for it.
        place = jnp.where(indices >= 0, jnp.arange(topk, dtype=jnp.int32), -1).reshape(-1, 1, topk)
        values = None if names.values is None else gathered(names.values)
        out, lse = sparse_attention(q.reshape(-1, 1, *q.shape[2:]), gathered(names.keys), values, place, **settings)
        return SparseAttentionOutput(out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3]))

    dense = heads if needs_dense_heads(call.request, has_index=index is not None) else None
    result = choose_and_attend(call, dense, heads, index, context, attend_selected=attend_gathered)
    return CachedAttentionOutput(result.out, result.topk_indices, cache)


def choose_and_attend(
    call: Attention,
    dense: Heads | None,
    selected: Heads | None,
    index: IndexHeads | None,
    context: LayerContext,
    *,
    has_shared_keys: bool = True,
    attend_selected: Callable[..., SparseAttentionOutput] | None = None,
) -> PerQuery:
    """Attention densely or to a selection, its KL and coverage, over all keys.

    Args:
        call, dense, selected, index, context: as in `attend`, with the keys of all positions.
        has_shared_keys: whether the selected heads share their keys, so that no device of `tensor` lacks any.
        attend_selected: (indices, **settings) -> attention to them; None is `sparse_attention` of `selected`.
    """
    (config, softmax_scale, request), visible = call, context.visible
    implementations = implementations_of(config)
    everything = indexer_recall = None
    if dense is not None:
        # Where dense attention is only a target, no gradient may come back through it.
        heads = Heads(*jax.lax.stop_gradient(dense[:3]), dense.d_v) if request.selects else dense
        settings: dict[str, Any] = {"d_v": heads.d_v, "implementation": implementations.dense_attention}
        everything = dense_attention(heads.q, heads.k, heads.v, visible, softmax_scale=softmax_scale, **settings)
    if not request.selects:
        assert everything is not None
        out, indices, kept_lse = everything.out, None, None
        n_keys = (visible.end - visible.start).astype(jnp.float32)
    else:
        assert selected is not None
        if request.by_indexer and index is None:
            assert context.previous_topk is not None
            indices = context.previous_topk
            if measures_indexer_recall(request):
                indexer_recall = jnp.full(visible.start.shape, jnp.nan, jnp.float32)
        else:
            rule, target = rule_of(request.attention), None
            if rule.needs_target:
                assert everything is not None
                k = selected.k if has_shared_keys else gather_heads(selected.k)
                target = Target(gather_heads(selected.q), k, gather_heads(everything.lse), softmax_scale)
            choice = Choice(config, visible, index, target, n_keys=selected.k.shape[1])
            indices = checkpoint_name(choose(rule, choice), TOPK_NAME)
            if measures_indexer_recall(request):
                indexer_recall = share_held(indices, choose(rule_of(SPARSE), choice))
        settings = {"d_v": selected.d_v, "implementation": implementations.sparse_attention, "softmax_scale": softmax_scale}
        if attend_selected is None:
            out, kept_lse = sparse_attention(selected.q, selected.k, selected.v, indices, **settings)
        else:
            out, kept_lse = attend_selected(indices, **settings)
        n_keys = jnp.sum(indices >= 0, axis=-1).astype(jnp.float32)

    kl = None
    if request.indexer_loss is not None:
        kl = jnp.zeros(visible.start.shape, jnp.float32)
        measured = context.served_by if index is None else index
        if measured is not None:
            is_sparse = request.indexer_loss == "sparse"
            taught_by = selected if is_sparse else dense
            lse = kept_lse if is_sparse else everything and everything.lse
            assert taught_by is not None and lse is not None
            settings = {
                "softmax_scale": softmax_scale,
                "activation": config.indexer.activation,
                "head_axis": axis_if_split("tensor"),
                "implementation": implementations.indexer_kl,
            }
            chosen = indices if is_sparse else None
            kl = indexer_kl(measured, visible, taught_by.q, taught_by.k, lse, topk_indices=chosen, **settings)
            if config.indexer.coarse_loss_weight and not is_sparse:
                kl += config.indexer.coarse_loss_weight * coarse_kl(
                    config.indexer, measured, visible, taught_by.q, taught_by.k, lse, **settings
                )

    coverage = None
    if request.coverage:
        if kept_lse is None:
            coverage = jnp.ones(visible.start.shape, jnp.float32)
        else:
            assert everything is not None
            coverage = mean_over("tensor", attention_mass(kept_lse, everything.lse))
    return PerQuery(out, n_keys, indices, kl, coverage, indexer_recall)


def attention_mass(kept_lse: Float[Array, "B T H"], all_lse: Float[Array, "B T H"]) -> Float[Array, "B T"]:
    """Share of the softmax mass held by the kept keys, mean over heads; 0 for a query that keeps none. No gradient."""
    kept_lse, all_lse = jax.lax.stop_gradient((kept_lse, all_lse))
    some = jnp.isfinite(kept_lse)
    share = jnp.exp(jnp.where(some, kept_lse, 0.0) - jnp.where(some, all_lse, 0.0))
    return jnp.mean(jnp.where(some, share, 0.0), axis=-1)


def _with_all_keys(heads: Heads, d_v: int | None) -> Heads:
    return Heads(heads.q, gather_keys(heads.k), None if heads.v is None else gather_keys(heads.v), d_v)


def _as_heads(rows: Float[Array, "B S ..."]) -> Float[Array, "B S G D"]:
    """Keys of one head for all, as MLA keeps them, with their axis of heads."""
    return rows[:, :, None, :] if rows.ndim == 3 else rows
