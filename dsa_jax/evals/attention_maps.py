"""Attention probabilities and index scores of every layer as whole matrices, for looking at short rows."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsa_jax.config.selections import DENSE
from dsa_jax.model import Transformer
from dsa_jax.model.attention.visibility import causal_visibility, segment_positions
from dsa_jax.model.block import Block
from dsa_jax.model.outputs import AttentionRequest, LayerContext
from pallas_kernels import index_scores


class AttentionMap(NamedTuple):
    """One layer.

    Fields:
        attention: float32 [B, T, S], softmax probability, mean over heads, the target of the indexer's KL; rows sum to 1.
        scores: float32 [B, T, S], index scores, -inf where the key is invisible; None for a layer without its own indexer.
    """

    attention: Float[Array, "B T S"]
    scores: Float[Array, "B T S"] | None


def attention_maps(model: Transformer, params: dict[str, Any], input_ids: Int[Array, "B T"]) -> list[AttentionMap]:
    """The maps of every layer under dense attention, in layer order; each row of `input_ids` is one segment.

    All of T x T is held for every head: meant for rows of some hundred tokens.
    """
    segment_ids = jnp.ones_like(input_ids)
    context = LayerContext(segment_positions(segment_ids), causal_visibility(segment_ids))
    bound = model.bind({"params": params})
    x = bound.embed(input_ids)
    maps: list[Any] = []
    for stack, stack_params in zip(bound.stacks, bound.layer_params, strict=True):
        for i in range(stack.n_layers):
            variables = {"params": jax.tree.map(lambda leaf, i=i: leaf[i], stack_params)}
            maps.append(stack.block.apply(variables, x, context, method=_map_of))
            x, _ = stack.block.apply(variables, x, context, AttentionRequest(DENSE))
    return maps


def _map_of(block: Block, x: Float[Array, "B T E"], context: LayerContext) -> AttentionMap:
    (positions, visible, *_), _ = block.for_role(context, AttentionRequest(DENSE))
    heads, index, softmax_scale = block.attention.parts(block.attention_norm(x), positions)
    q, k = heads.q.astype(jnp.float32), heads.k.astype(jnp.float32)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = softmax_scale * jnp.einsum("bthd,bshd->bhts", q, k, precision=jax.lax.Precision.HIGHEST)
    place = jnp.arange(x.shape[1])
    is_visible = (visible.start[..., None] <= place) & (place < visible.end[..., None])
    attention = jax.nn.softmax(logits, axis=-1, where=is_visible[:, None]).mean(axis=1)
    if index is None:
        return AttentionMap(attention, None)
    activation = block.config.attention.indexer.activation
    return AttentionMap(attention, index_scores(index, visible, activation=activation))
