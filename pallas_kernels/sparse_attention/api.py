"""Public ops: attention of each query over its own selected keys, which are an array or rows of a packed fp8 cache."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt8

from pallas_kernels.common import checks as _checks
from pallas_kernels.common import dispatch as _dispatch
from pallas_kernels.common.mesh import split_like, vary_alike
from pallas_kernels.common.numerics import with_sink
from pallas_kernels.common.topk import over_filled_slots
from pallas_kernels.quantize.cache_layouts import latent_row_bytes
from pallas_kernels.sparse_attention import pallas_gpu, pallas_gpu_fp8, reference, xla

_IMPLEMENTATIONS = {
    "reference": reference.sparse_attention,
    "xla": xla.sparse_attention,
    "pallas": pallas_gpu.sparse_attention,
}
_FP8_IMPLEMENTATIONS = {
    "reference": reference.sparse_attention_fp8,
    "xla": xla.sparse_attention_fp8,
    "pallas": pallas_gpu_fp8.sparse_attention_fp8,
}


class SparseAttentionOutput(NamedTuple):
    """`out` in the dtype of q; `lse`, natural log-sum-exp of the scaled logits over the selected keys, at least float32."""

    out: Float[Array, "B T H Dv"]
    lse: Float[Array, "B T H"]


def _check_sparse(q, k, v, topk_indices, softmax_scale, d_v, sink, **_):
    _checks.check_attention_arguments("sparse_attention", q, k, v, d_v)
    _checks.check_topk_indices("sparse_attention", topk_indices, *q.shape[:2])
    _checks.check_scale("sparse_attention", softmax_scale)
    _checks.check_sink("sparse_attention", sink, q)


@_checks.checked(_check_sparse)
@split_like("q", 3)
def sparse_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    v: Float[Array, "B S G Dv"] | None,
    topk_indices: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    d_v: int | None = None,
    sink: Float[Array, " H"] | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> SparseAttentionOutput:
    """Softmax attention of query t over the keys topk_indices[t], the same ones for every head.

    `out[t, h] = sum_s softmax_s(softmax_scale * q[t, h] . k[s, g(h)]) v[s, g(h)]` with head h in group `h // (H / G)`.
    Differentiable in q, k, v and sink, through both outputs, once and in reverse mode ("reference": in any). Visibility is
    whatever the selection says; no mask is added.

    Args:
        v: None for latent attention: the values are the leading `d_v` channels of the keys (all of them when d_v is None).
        topk_indices: any order; indices outside [0, S), such as -1, count as absent. A key listed twice counts twice. K may
            exceed S: where the slots from S on are all absent, as after a canonical selection, they cost nothing.
        sink: float32 [H], a logit without a value that takes part in every softmax of its head, in `lse`, too; None for none.
        deterministic: the same gradients, bit by bit, every run. On a GPU the gradients of k and v are otherwise added to
            memory in no fixed order; with it "pallas" sorts what each key gets, which costs a write and a read of the gradient
            of every selected key. Outputs, the gradient of q and everything on CPU have the same bits in any case.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        SparseAttentionOutput. A query with no valid index: out 0, lse -inf (the sink where there is one), gradients of q, k and
        v 0. Keys that nobody selected never
        matter, whatever they hold, NaN included.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: a dtype or number of channels that the implementation asked for does not cover, or one other than
            "pallas" asked to be deterministic on a GPU.

    Source: DeepSeek-V3.2-Exp report, section 1, MQA form of multi-head latent attention.
    """
    run = _dispatch.choose_implementation("sparse_attention", implementation, _IMPLEMENTATIONS)
    options = _dispatch.same_bits("sparse_attention", run, pallas_gpu.sparse_attention, deterministic)
    *arrays, sink = vary_alike(q, k, v, topk_indices, sink)
    *keys, indices = arrays
    attend = lambda indices: run(*keys, indices, softmax_scale=float(softmax_scale), d_v=d_v, **options)
    out, lse = over_filled_slots(attend, indices, k.shape[1])
    return SparseAttentionOutput(*with_sink(out, lse, sink))


def _check_sparse_fp8(q, pool, slots, softmax_scale, latent_dim, **_):
    op = "sparse_attention_fp8"
    _checks.check_float(op, q=q)
    _checks.check_array(op, pool=pool, slots=slots)
    _checks.check_scale(op, softmax_scale)
    _checks.check_shape(op, "q", q, (None,) * 4, "[B, T, heads, latent_dim + rotated channels]")
    if not _checks.is_whole(latent_dim) or not 0 < latent_dim <= q.shape[-1]:
        raise ValueError(
            f"{op}: latent_dim is {_checks.shown(latent_dim)}; expected 1 to {q.shape[-1]}, the head dim of q. Check "
            "model.attention.kv_lora_rank."
        )
    if pool.dtype != jnp.uint8:
        raise ValueError(f"{op}: pool has dtype {pool.dtype}; expected uint8 rows, as quantize.pack_latent_fp8 makes them.")
    row_bytes = latent_row_bytes(latent_dim, q.shape[-1] - latent_dim)
    _checks.check_shape(op, "pool", pool, (None, row_bytes), "[rows, bytes of a row], see quantize.pack_latent_fp8")
    _checks.check_topk_indices(op, slots, *q.shape[:2])


@_checks.checked(_check_sparse_fp8)
@split_like("q", 3)
def sparse_attention_fp8(
    q: Float[Array, "B T H Dk"],
    pool: UInt8[Array, "P bytes"],
    slots: Int32[Array, "B T K"],
    *,
    softmax_scale: float,
    latent_dim: int,
    implementation: str | None = None,
) -> SparseAttentionOutput:
    """`sparse_attention` in its latent form over packed fp8 rows: the keys are dequantised where they are read.

    The pool is shared by all batch rows: with a paged cache, `slots` are the selected positions translated through each
    sequence's page table, `page * page_size + offset`. For inference: it has no gradient.

    Args:
        pool: rows of `quantize.latent_row_bytes(latent_dim, Dk - latent_dim)` bytes (656 for 512 + 64 channels), made by
            `quantize.pack_latent_fp8`. Rows that nobody selects may hold anything.
        slots: rows of the pool, any order; outside [0, P), such as -1, counts as absent. A row listed twice counts twice.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device. "reference" dequantises to
            float32, the others to the dtype of q, which rounds unless the scales are powers of two.

    Returns:
        As `sparse_attention`: out [B, T, H, latent_dim] in the dtype of q, and lse.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        NotImplementedError: what the implementation asked for does not cover.
    """
    run = _dispatch.choose_implementation("sparse_attention_fp8", implementation, _FP8_IMPLEMENTATIONS)
    q, pool, slots = vary_alike(q, pool, slots)
    attend = lambda slots: run(q, pool, slots, softmax_scale=float(softmax_scale), latent_dim=latent_dim)
    return SparseAttentionOutput(*over_filled_slots(attend, slots, pool.shape[0]))
