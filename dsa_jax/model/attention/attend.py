"""The part that MLA and GQA share: attend densely or to a selection, and measure the indexer against it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsa_jax.config.implementations import Implementations
from dsa_jax.model.attention.coarse_loss import coarse_kl
from dsa_jax.model.attention.selection import (
    DENSE,
    NSA,
    SELECTORS,
    Budget,
    Heads,
    SelectionInputs,
    attention_modes,
    select_by_indexer,
    share_held,
)
from dsa_jax.model.attention.visibility import mean_over_valid
from dsa_jax.model.outputs import AttentionRequest
from dsa_jax.parallel.ambient import ROWS, axis_if_split, mean_over, per_device
from dsa_jax.parallel.sequence import HEADS, gather_heads, gather_keys, key_spec
from pallas_kernels import IndexHeads, Visible, dense_attention, indexer_kl, sparse_attention

TOPK_NAME = "topk_indices"
"""Name under which rematerialisation saves the selection."""


class AttentionOutput(NamedTuple):
    """Output of one attention layer (or of its core, before the output projection) and what it measured on the way."""

    out: Float[Array, "..."]
    topk_indices: Int[Array, "B T K"] | None
    indexer_kl: Float[Array, ""] | None
    coverage: Float[Array, ""] | None
    keys_per_query: Float[Array, ""]
    index_heads: IndexHeads | None = None
    indexer_recall: Float[Array, ""] | None = None


class AttentionParts(NamedTuple):
    """What one layer computes before it attends: heads for all visible keys, the indexer's (None without one), the scale."""

    heads: Heads
    index_heads: IndexHeads | None
    softmax_scale: float


def check_request(
    request: AttentionRequest,
    *,
    has_indexer: bool,
    has_nsa: bool = False,
    return_topk_indices: bool = False,
    cached: bool = False,
) -> None:
    """Reject what no layer could answer.

    Raises:
        ValueError: for an unknown mode or loss, or a combination of them that this model cannot compute.
        NotImplementedError: for native sparse attention over a cache, or for its selection, since every key group has its own.
    """
    if request.attention not in attention_modes():
        raise ValueError(f"attention is {request.attention!r}; expected one of {', '.join(attention_modes())}.")
    if request.indexer_loss not in (None, "dense", "sparse"):
        raise ValueError(f"indexer_loss is {request.indexer_loss!r}; expected None, 'dense' or 'sparse'.")
    if request.indexer_loss and not has_indexer:
        raise ValueError(
            f"indexer_loss is {request.indexer_loss!r}, but the model has no indexer. Set attention.indexer.enabled=True."
        )
    if request.attention == NSA:
        _check_nsa(request, has_nsa=has_nsa, return_topk_indices=return_topk_indices, cached=cached)
    elif request.attention == DENSE:
        if request.indexer_loss == "sparse":
            raise ValueError(
                "indexer_loss is 'sparse' with attention 'dense', which selects no keys; expected indexer_loss 'dense', or an "
                "attention that selects, such as 'sparse'."
            )
        if return_topk_indices:
            raise ValueError(
                "return_topk_indices is True with attention 'dense', which selects no keys. Use attention='sparse' to see what "
                "the indexer selects."
            )
    elif SELECTORS[request.attention].uses_indexer and not has_indexer:
        raise ValueError(
            f"attention is {request.attention!r}, but the model has no indexer. Set attention.indexer.enabled=True, or use "
            "'dense' or 'window'."
        )


def _check_nsa(request: AttentionRequest, *, has_nsa: bool, return_topk_indices: bool, cached: bool) -> None:
    if not has_nsa:
        raise ValueError("attention is 'nsa', whose weights the model lacks. Set attention.nsa.enabled=True, or use 'dense'.")
    if request.indexer_loss:
        raise ValueError(
            f"indexer_loss is {request.indexer_loss!r} with attention 'nsa', which learns from the model's loss alone; "
            "expected None."
        )
    if return_topk_indices:
        raise NotImplementedError(
            "return_topk_indices is True with attention 'nsa', which selects blocks for each key-value group. Leave it False, "
            "or use another attention."
        )
    if cached:
        raise NotImplementedError(
            "attention 'nsa' cannot run over a cache: its compressed keys are not kept there. Evaluate whole rows, or name "
            "another attention, such as 'dense'."
        )


def needs_dense_heads(request: AttentionRequest, *, has_indexer: bool) -> bool:
    """Whether a pass of dense attention is part of the answer; `has_indexer`: there are index heads to measure against it."""
    if request.attention == DENSE:
        return True
    dense_loss = request.indexer_loss == "dense" and has_indexer
    return request.coverage or dense_loss or SELECTORS[request.attention].needs_dense_lse


def needs_indexer(request: AttentionRequest) -> bool:
    """Whether an indexer has anything to do: to select, or to be trained."""
    return by_indexer(request) or request.indexer_loss is not None


def by_indexer(request: AttentionRequest) -> bool:
    """Whether the indexer's scores choose the keys."""
    return request.attention in SELECTORS and SELECTORS[request.attention].uses_indexer


def measures_indexer_recall(request: AttentionRequest) -> bool:
    """Whether a selection that the indexer chooses otherwise than key by key is compared with its top-k keys."""
    return request.coverage and by_indexer(request) and SELECTORS[request.attention].select is not select_by_indexer


class _PerQuery(NamedTuple):
    """Results by query, None where not asked for: `out` [B, T, H, Dv], `topk_indices` [B, T, K], the others [B, T]."""

    out: Any
    n_keys: Any
    topk_indices: Any = None
    indexer_kl: Any = None
    coverage: Any = None
    indexer_recall: Any = None


def attend(
    dense: Heads | None,
    selected: Heads | None,
    index: IndexHeads | None,
    previous_topk: Int[Array, "B T K"] | None,
    served_by: IndexHeads | None = None,
    *,
    request: AttentionRequest,
    budget: Budget,
    softmax_scale: float,
    visible: Visible,
    activation: str,
    implementations: Implementations,
) -> AttentionOutput:
    """Attention as `request` asks, in the form of heads that suits it.

    On a mesh each device takes its rows, its heads and its positions; keys are gathered along `context`, the indexer is the
    same on all devices of `tensor`.

    Args:
        dense: heads for attention to all visible keys; needed where `needs_dense_heads` says so.
        selected: heads for attention to a selection; needed unless the request is dense.
        index: this layer's indexer; None for a layer that has none or shares.
        previous_topk: selection of the previous layer, reused by a layer that shares.
        served_by: index heads of the layer whose selection this one reuses, for their KL against this layer's attention; None
            where an indexer learns from its own layer alone.
        activation: of the index scores.

    Returns:
        `out` [B, T, H, Dv] in the form of the heads used. A padding query gives 0.
    """

    def core(
        dense_arrays: Heads | None,
        selected_arrays: Heads | None,
        index: IndexHeads | None,
        previous_topk: Array | None,
        served_by: IndexHeads | None,
        visible: Visible,
    ) -> _PerQuery:
        return _attend(
            dense and _with_all_keys(dense_arrays, dense.d_v),
            selected and _with_all_keys(selected_arrays, selected.d_v),
            index and index._replace(k=gather_keys(index.k)),
            previous_topk,
            served_by and served_by._replace(k=gather_keys(served_by.k)),
            request,
            budget,
            softmax_scale,
            visible,
            activation,
            implementations,
            has_shared_keys=selected is not None and selected.k.shape[2] == 1,
        )

    results = _PerQuery(
        out=HEADS,
        n_keys=ROWS,
        topk_indices=None if request.attention == DENSE else ROWS,
        indexer_kl=None if request.indexer_loss is None else ROWS,
        coverage=ROWS if request.coverage else None,
        indexer_recall=ROWS if measures_indexer_recall(request) else None,
    )
    # The static width of the values is no array, so it stays behind.
    arrays = [heads and heads._replace(d_v=None) for heads in (dense, selected)]
    specs = [heads and Heads._make([HEADS, *(x if x is None else key_spec(x) for x in heads[1:])]) for heads in arrays]
    spread = per_device(core, in_specs=(*specs, ROWS, ROWS, ROWS, ROWS), out_specs=results)
    per_query = spread(*arrays, index, previous_topk, served_by, visible)
    mean = lambda x: None if x is None else mean_over_valid(x, visible.some)
    return AttentionOutput(
        out=per_query.out,
        topk_indices=per_query.topk_indices,
        indexer_kl=mean(per_query.indexer_kl),
        coverage=mean(per_query.coverage),
        keys_per_query=mean_over_valid(per_query.n_keys, visible.some),
        index_heads=index,
        indexer_recall=mean(per_query.indexer_recall),
    )


def _with_all_keys(heads: Heads | None, d_v: int | None) -> Heads | None:
    return heads and Heads(heads.q, gather_keys(heads.k), None if heads.v is None else gather_keys(heads.v), d_v)


def _attend(
    dense: Heads | None,
    selected: Heads | None,
    index: IndexHeads | None,
    previous_topk: Array | None,
    served_by: IndexHeads | None,
    request: AttentionRequest,
    budget: Budget,
    softmax_scale: float,
    visible: Visible,
    activation: str,
    implementations: Implementations,
    *,
    has_shared_keys: bool,
) -> _PerQuery:
    everything = indexer_recall = None
    if dense is not None:
        # Where dense attention is only the yardstick, no gradient may come back through it.
        heads = dense if request.attention == DENSE else jax.lax.stop_gradient(dense)
        everything = dense_attention(
            heads.q,
            heads.k,
            heads.v,
            visible,
            softmax_scale=softmax_scale,
            d_v=heads.d_v,
            implementation=implementations.dense_attention,
        )
    if request.attention == DENSE:
        assert everything is not None
        out, indices, kept_lse = everything.out, None, None
        n_keys = (visible.end - visible.start).astype(jnp.float32)
    else:
        assert selected is not None
        selector = SELECTORS[request.attention]
        if selector.uses_indexer and index is None:
            assert previous_topk is not None
            indices = previous_topk
            if measures_indexer_recall(request):
                indexer_recall = jnp.full(visible.start.shape, jnp.nan, jnp.float32)
        else:
            heads, lse = selected, None
            if selector.needs_dense_lse:
                assert everything is not None
                lse = gather_heads(everything.lse)
                heads = heads._replace(q=gather_heads(heads.q), k=heads.k if has_shared_keys else gather_heads(heads.k))
            inputs = SelectionInputs(budget, visible, heads, softmax_scale, index, lse, implementations, activation)
            indices = checkpoint_name(selector.select(inputs), TOPK_NAME)
            if measures_indexer_recall(request):
                indexer_recall = share_held(indices, select_by_indexer(inputs))
        kept = sparse_attention(
            selected.q,
            selected.k,
            selected.v,
            indices,
            softmax_scale=softmax_scale,
            d_v=selected.d_v,
            implementation=implementations.sparse_attention,
        )
        out, kept_lse = kept.out, kept.lse
        n_keys = jnp.sum(indices >= 0, axis=-1).astype(jnp.float32)

    kl = None
    if request.indexer_loss is not None:
        kl = jnp.zeros(visible.start.shape, jnp.float32)
        measured = served_by if index is None else index
        if measured is not None:
            sparse_loss = request.indexer_loss == "sparse"
            target = selected if sparse_loss else dense
            lse = kept_lse if sparse_loss else everything.lse if everything is not None else None
            assert target is not None and lse is not None
            settings: dict[str, Any] = {
                "softmax_scale": softmax_scale,
                "activation": activation,
                "head_axis": axis_if_split("tensor"),
                "implementation": implementations.indexer_kl,
            }
            chosen = indices if sparse_loss else None
            kl = indexer_kl(measured, visible, target.q, target.k, lse, topk_indices=chosen, **settings)
            if budget.coarse_loss_weight and not sparse_loss:
                settings |= {"block_size": budget.block_size, "pooling": budget.pooling}
                kl += budget.coarse_loss_weight * coarse_kl(measured, visible, target, lse, **settings)

    coverage = None
    if request.coverage:
        if kept_lse is None:
            coverage = jnp.ones(visible.start.shape, jnp.float32)
        else:
            assert everything is not None
            coverage = mean_over("tensor", attention_mass(kept_lse, everything.lse))
    return _PerQuery(out, n_keys, indices, kl, coverage, indexer_recall)


def attention_mass(kept_lse: Float[Array, "B T H"], all_lse: Float[Array, "B T H"]) -> Float[Array, "B T"]:
    """Share of the softmax mass held by the kept keys, mean over heads; 0 for a query that keeps none. No gradient."""
    kept_lse, all_lse = jax.lax.stop_gradient((kept_lse, all_lse))
    some = jnp.isfinite(kept_lse)
    share = jnp.exp(jnp.where(some, kept_lse, 0.0) - jnp.where(some, all_lse, 0.0))
    return jnp.mean(jnp.where(some, share, 0.0), axis=-1)
