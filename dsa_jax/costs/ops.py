"""FLOPs and bytes of each op from the shapes of its arrays, and the roofline that a device's peaks set for them.

The one source of operation counts: MFU, the rooflines of benchmarks and the dollars per token are all derived from it. A
multiply-add is two FLOPs.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.quantize import latent_row_bytes


class HeadSizes(NamedTuple):
    """Heads of an attention op and their channels, and its FLOPs per query and key.

    Fields: `heads` of the queries and `groups` of the keys; `dim` channels of a query or key; `value_dim` channels of a value,
    None where the values are the leading `d_v` channels of the keys.
    """

    heads: int
    groups: int
    dim: int
    value_dim: int | None = None
    d_v: int | None = None

    @property
    def width(self) -> int:
        """Channels of one value."""
        return self.value_dim or self.d_v or self.dim

    @property
    def logit_flops(self) -> float:
        """q . k alone."""
        return 2.0 * self.heads * self.dim

    @property
    def forward_flops(self) -> float:
        """q . k, and the probability times v."""
        return self.logit_flops + 2.0 * self.heads * self.width

    @property
    def backward_flops(self) -> float:
        """q . k recomputed, the gradients of q and k (`dim` channels each), of the probability and of v (`width` each)."""
        return 2.0 * self.heads * (3 * self.dim + 2 * self.width)


def score_flops(index_heads: int, index_dim: int) -> float:
    """FLOPs of one index score, of one query and key."""
    return 2.0 * index_heads * index_dim


def kl_flops(attention: HeadSizes, score: float) -> float:
    """FLOPs per query and key of the indexer's KL with its gradient.

    The attention logits of the target, the index score (`score` FLOPs), and its gradients with respect to query and key.
    """
    return attention.logit_flops + 3 * score


class OpShape(NamedTuple):
    """Sizes of one call; an op reads the fields it has. Every query of an indexer or dense op sees all keys: no mask.

    `value_dim` None means that the values are the leading `d_v` channels of the keys. `dtype` is that of queries and keys,
    `selection` where the selected keys lie: "random", one from each of topk equal parts of the context, or "local", its end.
    """

    queries: int
    keys: int
    topk: int = 1
    batch: int = 1
    heads: int = 1
    groups: int = 1
    dim: int = 1
    value_dim: int | None = None
    d_v: int | None = None
    index_heads: int = 1
    index_dim: int = 1
    dtype: str = "bfloat16"
    selection: str = "random"

    @property
    def attention(self) -> HeadSizes:
        """Heads and channels of the attention."""
        return HeadSizes(self.heads, self.groups, self.dim, self.value_dim, self.d_v)

    @property
    def width(self) -> int:
        """Channels of one value."""
        return self.attention.width

    @property
    def itemsize(self) -> int:
        """Bytes of one element of `dtype`."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def rows(self) -> int:
        """Queries of all batch rows."""
        return self.batch * self.queries

    def reduced(self, queries: int, keys: int, topk: int) -> "OpShape":
        """The same geometry with at most so many queries, keys and selected keys."""
        return self._replace(
            queries=min(self.queries, queries),
            keys=min(self.keys, keys),
            topk=min(self.topk, topk),
            batch=min(self.batch, 2),
        )


class Cost(NamedTuple):
    """FLOPs, and bytes read or written at least once."""

    flops: float
    bytes: float


def _index_cost(s: OpShape, results: int) -> Cost:
    """Scores of all visible pairs; `results` of them, four bytes each, are written."""
    scale_bytes = 4 if s.itemsize == 1 else 0  # one float32 per fp8 key
    inputs = s.batch * s.keys * (s.index_dim * s.itemsize + scale_bytes) + s.rows * s.index_heads * (
        s.index_dim * s.itemsize + 4
    )
    return Cost(s.rows * s.keys * score_flops(s.index_heads, s.index_dim), inputs + 4 * results)


def _attention_cost(op: str, s: OpShape) -> Cost:
    """Attention forward or backward, to all keys or to the selected ones; a key that several queries select is read once."""
    heads, is_dense, is_backward = s.attention, op == "dense_attention", op.endswith("_backward")
    pairs = s.rows * (s.keys if is_dense else s.topk)
    key_bytes: float = s.itemsize * s.groups * (s.dim + (s.value_dim or 0))
    if op == "decode_fp8":
        key_bytes = latent_row_bytes(s.width, s.dim - s.width)
    query_bytes = s.itemsize * s.rows * s.heads * (s.dim + s.width)
    if is_backward:
        # Gradients of the keys are summed in float32, which is one write and one read more, and then rounded.
        query_bytes, key_bytes = 2 * query_bytes, key_bytes * (2 + 8 / s.itemsize)
    list_bytes, lse_bytes = 0 if is_dense else 4 * pairs, 4 * s.rows * s.heads
    flops = heads.backward_flops if is_backward else heads.forward_flops
    return Cost(pairs * flops, query_bytes + min(s.batch * s.keys, pairs) * key_bytes + list_bytes + lse_bytes)


def _kl_cost(op: str, s: OpShape) -> Cost:
    """The indexer's KL and its gradient, over the visible keys or the selected ones."""
    is_selected = op == "indexer_kl_selected"
    pairs = s.rows * (s.topk if is_selected else s.keys)
    read = min(s.batch * s.keys, pairs)
    learned = s.itemsize * s.index_dim * (s.rows * s.index_heads + read) + 4 * s.rows * s.index_heads
    attention = s.itemsize * s.dim * (s.rows * s.heads + read * s.groups) + 4 * s.rows * s.heads
    flops = pairs * kl_flops(s.attention, score_flops(s.index_heads, s.index_dim))
    return Cost(flops, attention + 2 * learned + (4 * pairs if is_selected else 0))


def op_cost(op: str, shape: OpShape) -> Cost:
    """FLOPs and bytes of `op` at `shape`; padding, recomputation and work arrays are not counted.

    The backward pass recomputes q . k; no way around that is known.

    Raises:
        ValueError: an op without a formula.
    """
    if op in ("index_scores", "index_topk"):
        return _index_cost(shape, shape.rows * (shape.keys if op == "index_scores" else shape.topk))
    if op in ("sparse_attention", "sparse_attention_backward", "decode", "decode_fp8", "dense_attention"):
        return _attention_cost(op, shape)
    if op in ("indexer_kl_selected", "indexer_kl_visible"):
        return _kl_cost(op, shape)
    raise ValueError(f"there is no cost for op {op!r}; add it to dsa_jax.costs.ops.")


class Peaks(NamedTuple):
    """Peak FLOP/s in bfloat16 and in fp8, and memory bandwidth in bytes per second."""

    flops: float
    fp8_flops: float
    bytes: float


# H200: bfloat16 and bandwidth measured by others on one, fp8 assumed. H100: the same chip; its bandwidth is the data sheet's.
_PEAKS = {"H200": Peaks(788e12, 1500e12, 4.3e12), "H100": Peaks(788e12, 1500e12, 3.35e12)}


def peaks_of(device_kind: str) -> Peaks | None:
    """The peaks of a device by its kind, as JAX names it ("NVIDIA H200"); None for one that is not listed."""
    return next((peaks for name, peaks in _PEAKS.items() if name in device_kind), None)


def floor_seconds(op: str, shape: OpShape, device_kind: str) -> float | None:
    """Roofline of `op`: the longer of its FLOPs at peak and its bytes at full bandwidth; None for an unlisted device."""
    peaks = peaks_of(device_kind)
    if peaks is None:
        return None
    cost = op_cost(op, shape)
    is_fp8 = op.startswith("index_") and shape.itemsize == 1
    return max(cost.flops / (peaks.fp8_flops if is_fp8 else peaks.flops), cost.bytes / peaks.bytes)
