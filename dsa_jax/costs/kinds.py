"""Work of each attention kind per query and key; knows the config, no model code."""

from typing import NamedTuple

from dsa_jax.config import AttentionConfig
from dsa_jax.costs.ops import HeadSizes, score_flops


class KindCosts(NamedTuple):
    """One layer's attention.

    Fields: `expanded` heads as dense prefill and training multiply them; `absorbed` heads as decode and attention to selected
    keys do; `score` FLOPs of the index score per query and key, 0 without an indexer.
    """

    expanded: HeadSizes
    absorbed: HeadSizes
    score: float


def gqa_costs(attention: AttentionConfig) -> KindCosts:
    """Grouped-query attention: one form for everything."""
    heads = HeadSizes(attention.n_heads, attention.n_kv_heads, attention.head_dim, attention.head_dim)
    return KindCosts(heads, heads, _score(attention))


def mla_costs(attention: AttentionConfig) -> KindCosts:
    """Latent attention: keys and values expanded per head, or one latent row that all heads read (absorbed)."""
    n_heads, rope_dim, rank = attention.n_heads, attention.qk_rope_head_dim, attention.kv_lora_rank
    expanded = HeadSizes(n_heads, n_heads, attention.qk_nope_head_dim + rope_dim, attention.v_head_dim)
    return KindCosts(expanded, HeadSizes(n_heads, 1, rank + rope_dim, d_v=rank), _score(attention))


def _score(attention: AttentionConfig) -> float:
    indexer = attention.indexer
    return score_flops(indexer.n_heads, indexer.head_dim) if indexer.enabled else 0.0
