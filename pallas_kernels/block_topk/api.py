"""Public op: the blocks of keys that native sparse attention selects."""

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.block_topk import reference, xla
from pallas_kernels.block_topk.geometry import BlockGeometry
from pallas_kernels.common import checks as _checks
from pallas_kernels.common import dispatch as _dispatch
from pallas_kernels.common.mesh import split_like, vary_alike
from pallas_kernels.common.numerics import clamped
from pallas_kernels.types import Visible

_IMPLEMENTATIONS = {"reference": reference.block_topk, "xla": xla.block_topk}


def _check(q, k_compressed, lse, visible, softmax_scale, n_keys, geometry, **_):
    op = "block_topk"
    _checks.check_attention_arguments(op, q, k_compressed)
    _checks.check_lse(op, lse, q)
    _checks.check_visible(op, visible, *q.shape[:2])
    _checks.check_scale(op, softmax_scale)
    sizes = (n_keys, *geometry) if isinstance(geometry, BlockGeometry) else ("",)
    if not all(_checks.is_whole(size) and abs(size) <= _checks.INT32 for size in sizes):
        raise ValueError(
            f"{op}: n_keys is {_checks.shown(n_keys)} and geometry {_checks.shown(geometry)}; "
            "expected whole numbers below 2**31 and a BlockGeometry of such."
        )
    _checks.check_topk(op, geometry.topk)
    sizes = {name: getattr(geometry, name) for name in ("compress_block", "select_block")}
    forced = {name: getattr(geometry, name) for name in ("n_initial", "n_local")}
    if min(sizes.values()) < 1 or min(forced.values()) < 0 or sum(forced.values()) > geometry.topk:
        raise ValueError(
            f"{op}: {', '.join(f'{name} is {value}' for name, value in {**sizes, **forced}.items())}, topk {geometry.topk}; "
            "expected blocks of at least one key, and no more forced blocks than topk."
        )
    stride = geometry.compress_stride
    if stride < 1 or geometry.compress_block % stride or geometry.select_block % stride:
        raise ValueError(
            f"{op}: compress_stride is {stride}; expected a positive divisor of compress_block ({geometry.compress_block}) and "
            f"select_block ({geometry.select_block})."
        )
    if k_compressed.shape[1] != geometry.n_compressed(n_keys):
        raise ValueError(
            f"{op}: k_compressed has {k_compressed.shape[1]} keys; expected {geometry.n_compressed(n_keys)}, as many as lie "
            f"within n_keys ({n_keys}). Check n_keys and the geometry."
        )


@_checks.checked(_check)
@split_like("q", 2)
def block_topk(
    q: Float[Array, "B T H D"],
    k_compressed: Float[Array, "B N G D"],
    lse: Float[Array, "B T H"],
    visible: Visible,
    *,
    softmax_scale: float,
    n_keys: int,
    geometry: BlockGeometry,
    implementation: str | None = None,
) -> Int32[Array, "B T G {geometry.topk}"]:
    """The selection blocks that hold most probability of attention to the compressed keys, by query and key group.

    Block j scores `sum_i w_ij sum_h exp(softmax_scale * q[t, h] . k_compressed[i, g] - lse[t, h])` over the heads h of group g,
    where w_ij counts the strides of compressed key i in block j. Blocks with a visible key compete; those that `geometry`
    forces come first, then the higher score. Carries no gradient.

    Args:
        k_compressed: one key per compressed block; those that a query does not see as a whole never matter to it.
        lse: of attention to the compressed keys, natural log; -inf where there is none.
        n_keys: keys that the blocks are made of, S.
        visible: range of keys (not of compressed ones); bounds outside [0, n_keys] are clamped.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        Block numbers, int32, ascending, ties to the lower block, -1 after the last valid one.

    Raises:
        ValueError: shapes, dtypes or a geometry that do not fit.

    Source: arXiv 2502.11089, equations 8 to 12 and section 4.1.
    """
    run = _dispatch.choose_implementation("block_topk", implementation, _IMPLEMENTATIONS)
    visible = clamped(visible, n_keys)
    q, k_compressed, lse, visible = jax.lax.stop_gradient(vary_alike(q, k_compressed, lse, visible))
    return run(q, k_compressed, lse, visible, softmax_scale=float(softmax_scale), n_keys=n_keys, geometry=geometry)
