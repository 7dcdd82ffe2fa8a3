"""Public ops: attention over a range of keys per query, and the keys that hold most of its probability."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import checks as _checks
from pallas_kernels.common import dispatch as _dispatch
from pallas_kernels.common.mesh import split_like, vary_alike
from pallas_kernels.common.numerics import with_sink
from pallas_kernels.common.topk import within_keys
from pallas_kernels.dense_attention import reference, xla
from pallas_kernels.types import Visible

_DENSE = {"reference": reference.dense_attention, "xla": xla.dense_attention}
_TOPK = {"reference": reference.attention_topk, "xla": xla.attention_topk}


class DenseAttentionOutput(NamedTuple):
    """`out` in the dtype of q; `lse`, natural log-sum-exp of the scaled logits over the visible keys, at least float32."""

    out: Float[Array, "B T H Dv"]
    lse: Float[Array, "B T H"]


def _check_dense(q, k, v, visible, softmax_scale, d_v, sink, **_):
    _checks.check_attention_arguments("dense_attention", q, k, v, d_v)
    _checks.check_visible("dense_attention", visible, *q.shape[:2])
    _checks.check_scale("dense_attention", softmax_scale)
    _checks.check_sink("dense_attention", sink, q)


@_checks.checked(_check_dense)
@split_like("q", 3)
def dense_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    visible: Visible,
    *,
    softmax_scale: float,
    d_v: int | None = None,
    sink: Float[Array, " H"] | None = None,
    implementation: str | None = None,
) -> DenseAttentionOutput:
    """Softmax attention of query t over all keys in its visible range.

    `out[t, h] = sum_s softmax_s(softmax_scale * q[t, h] . k[s, g(h)]) v[s, g(h)]` with head h in group `h // (H / G)`.
    Differentiable in q, k, v and sink, through both outputs, once and in reverse mode ("reference": in any).

    Args:
        v: None for latent attention: the values are the leading `d_v` channels of the keys (all of them when d_v is None).
        visible: query t sees keys [start, end); bounds outside [0, S] are clamped, start == end is empty.
        sink: float32 [H], a logit without a value that takes part in every softmax of its head, in `lse`, too; None for none.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        DenseAttentionOutput. A query that sees nothing: out 0, lse -inf (the sink where there is one), gradients of q, k and v
        0. Keys that no query of their batch row sees never matter, whatever they hold, NaN included; keys that some queries
        see must be finite.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a known start > end.
    """
    run = _dispatch.choose_implementation("dense_attention", implementation, _DENSE)
    q, k, v, visible, sink = vary_alike(q, k, v, visible, sink)
    out, lse = run(q, k, v, visible, softmax_scale=float(softmax_scale), d_v=d_v)
    return DenseAttentionOutput(*with_sink(out, lse, sink))


def _check_topk(q, k, lse, visible, softmax_scale, topk, **_):
    _checks.check_attention_arguments("attention_topk", q, k)
    _checks.check_lse("attention_topk", lse, q)
    _checks.check_topk("attention_topk", topk)
    _checks.check_visible("attention_topk", visible, *q.shape[:2])
    _checks.check_scale("attention_topk", softmax_scale)


@_checks.checked(_check_topk)
@split_like("q", 2)
def attention_topk(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S G D"],
    lse: Float[Array, "B T H"],
    visible: Visible,
    *,
    softmax_scale: float,
    topk: int,
    implementation: str | None = None,
) -> Int32[Array, "B T {topk}"]:
    """The `topk` visible keys that hold most attention probability, summed over heads: what a perfect indexer would select.

    Ranks keys by `sum_h exp(softmax_scale * q[t, h] . k[s, g(h)] - lse[t, h])`. Carries no gradient.

    Args:
        lse: of `dense_attention` over the same keys, natural log.
        topk: selected keys per query; may exceed S.
        visible: query t sees keys [start, end); bounds outside [0, S] are clamped, start == end is empty.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        topk_indices, int32, canonical as in `index_topk`: ascending, ties to the lower position, -1 after the last valid one.

    Raises:
        ValueError: shapes or dtypes that do not fit, topk below 1, or a known start > end.
    """
    run = _dispatch.choose_implementation("attention_topk", implementation, _TOPK)
    q, k, lse, visible = jax.lax.stop_gradient(vary_alike(q, k, lse, visible))
    select = lambda topk: run(q, k, lse, visible, softmax_scale=float(softmax_scale), topk=topk)
    return within_keys(select, k.shape[1], topk)
