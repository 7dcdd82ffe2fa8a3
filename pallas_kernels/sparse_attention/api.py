"""Public op: attention of each query over its own selected keys."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels import _checks, _dispatch
from pallas_kernels.sparse_attention import pallas_gpu, reference, xla

_IMPLEMENTATIONS = {
    "reference": reference.sparse_attention,
    "xla": xla.sparse_attention,
    "pallas": pallas_gpu.sparse_attention,
}


class SparseAttentionOutput(NamedTuple):
    """`out` in the dtype of q; `lse`, natural log-sum-exp of the scaled logits over the selected keys, at least float32."""

    out: Float[Array, "B T H Dv"]
    lse: Float[Array, "B T H"]


def _check_sparse(q, k, v, topk_indices, d_v, **_):
    _checks.check_attention_arguments("sparse_attention", q, k, v, d_v)
    _checks.check_topk_indices("sparse_attention", topk_indices, *q.shape[:2])


@_checks.checked(_check_sparse)
def sparse_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    topk_indices: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    d_v: int | None = None,
    implementation: str | None = None,
) -> SparseAttentionOutput:
    """Softmax attention of query t over the keys topk_indices[t], the same ones for every head.

    `out[t, h] = sum_s softmax_s(softmax_scale * q[t, h] . k[s, g(h)]) v[s, g(h)]` with head h in group `h // (H / G)`.
    Differentiable in q, k and v, through both outputs. Visibility is whatever the selection says; no mask is added.

    Args:
        v: None for latent attention: the values are the leading `d_v` channels of the keys (all of them when d_v is None).
        topk_indices: any order; indices outside [0, S), such as -1, count as absent. A key listed twice counts twice.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device. "pallas" adds up the gradients
            of k and v in no fixed order on a GPU; `pallas_gpu.sparse_attention` has an option for the same bits every run.

    Returns:
        SparseAttentionOutput. A query with no valid index: out 0, lse -inf, gradients 0. Keys that nobody selected never
        matter, whatever they hold, NaN included.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: a dtype or number of channels that the implementation asked for does not cover.

    Source: DeepSeek-V3.2-Exp report, section 1, MQA form of multi-head latent attention.
    """
    run = _dispatch.choose("sparse_attention", implementation, _IMPLEMENTATIONS, platform=jax.default_backend())
    return SparseAttentionOutput(*run(q, k, v, topk_indices, softmax_scale=softmax_scale, d_v=d_v))
