"""Public ops: index scores and the exact top-k selection over them."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import checks as _checks
from pallas_kernels.common import dispatch as _dispatch
from pallas_kernels.common.activation import check_activation
from pallas_kernels.common.activation_options import activation_options
from pallas_kernels.common.explicit import split_like
from pallas_kernels.common.forced import check_forced, scored_range, with_forced
from pallas_kernels.common.varying import vary_alike
from pallas_kernels.index_topk import mosaic_gpu, pallas_gpu, reference, triton_gpu, xla

_SCORES: dict[str, Callable[..., Any]] = {
    "reference": reference.index_scores,
    "xla": xla.index_scores,
    "pallas": pallas_gpu.index_scores,
    "mosaic": mosaic_gpu.index_scores,
}
_TOPK: dict[str, Callable[..., Any]] = {
    "reference": reference.index_topk,
    "xla": xla.index_topk,
    "pallas": pallas_gpu.index_topk,
    "triton": triton_gpu.index_topk,
    "mosaic": mosaic_gpu.index_topk,
}


def _check_scores(q_index, k_index, weights, visible_start, visible_end, k_scale, activation, **_):
    _checks.check_index_arguments("index_scores", q_index, k_index, weights, k_scale, fp8=True)
    _checks.check_ranges("index_scores", visible_start, visible_end, *q_index.shape[:2])
    check_activation("index_scores", activation, q_index=q_index, k_scale=k_scale)


@_checks.checked(_check_scores)
@split_like("q_index", 2)
def index_scores(
    q_index: Float[Array, "B T Hi Di"],
    k_index: Float[Array, "B S Di"],
    weights: Float[Array, "B T Hi"],
    *,
    visible_start: Int32[Array, "B T"],
    visible_end: Int32[Array, "B T"],
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
    implementation: str | None = None,
) -> Float[Array, "B T S"]:
    """Scores of the lightning indexer: how much query t wants key s.

    `score[t, s] = k_scale[s] * sum_h weights[t, h] * relu(q_index[t, h] . k_index[s])`. The result holds T x S numbers: it is
    meant for inspection and tests, `index_topk` never builds it.

    Args:
        q_index, k_index: a float dtype, or both e4m3, as `quantize.quantize_fp8` makes them.
        weights: float32, signed, the static scales `n_index_heads ** -0.5 * index_head_dim ** -0.5` folded in, and for e4m3
            queries the scale of each.
        visible_start, visible_end: query t sees keys [start, end); bounds outside [0, S] are clamped, start == end is empty.
        k_scale: positive scale of each key, 1 when left out; exact where it is a power of two.
        activation: "relu" as in the source, or a variant to compare it with: "none" weighs the products themselves, "softmax"
            puts for each head and query `softmax_s(q_index[t, h] . k_index[s])` over the visible keys in the ReLU's place, with
            no scale of its own: fold one into q_index.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        Scores, accumulated and returned in float32 (float64 for float64 inputs), -inf where the key is invisible.
        Differentiable; the gradient of the ReLU at 0 is 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a known start > end, or fp8 queries or a k_scale with a softmax.
        NotImplementedError: an implementation that has no other activation than the ReLU.

    Source: DeepSeek-V3.2-Exp report, section 1, equation 1. The other activations are ours.
    """
    run = _dispatch.choose("index_scores", implementation, _SCORES, platform=_dispatch.traced_platform())
    portable = reference.index_scores, xla.index_scores
    arrays = vary_alike(q_index, k_index, weights, k_scale, visible_start, visible_end)
    q_index, k_index, weights, k_scale, visible_start, visible_end = arrays
    ranges = visible_start, visible_end
    options = activation_options("index_scores", activation, run, portable, q_index, k_index, *ranges, implementation)
    return run(q_index, k_index, weights, *ranges, k_scale=k_scale, **options)


def _check_topk(
    q_index, k_index, weights, topk, visible_start, visible_end, k_scale, activation, forced_sink, forced_local, **_
):
    _checks.check_index_arguments("index_topk", q_index, k_index, weights, k_scale, fp8=True)
    _checks.check_topk("index_topk", topk)
    check_forced("index_topk", topk, forced_sink, forced_local)
    _checks.check_ranges("index_topk", visible_start, visible_end, *q_index.shape[:2])
    check_activation("index_topk", activation, q_index=q_index, k_scale=k_scale)


@_checks.checked(_check_topk)
@split_like("q_index", 2)
def index_topk(
    q_index: Float[Array, "B T Hi Di"],
    k_index: Float[Array, "B S Di"],
    weights: Float[Array, "B T Hi"],
    *,
    topk: int,
    visible_start: Int32[Array, "B T"],
    visible_end: Int32[Array, "B T"],
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
    forced_sink: int = 0,
    forced_local: int = 0,
    implementation: str | None = None,
) -> Int32[Array, "B T {topk}"]:
    """The `topk` visible keys with the highest index score, per query; one selection shared by all attention heads.

    Scores as in `index_scores`. Carries no gradient.

    Args:
        weights: float32, signed, static scales folded in (a positive factor never changes the selection).
        topk: selected keys per query (k in the paper); may exceed S.
        visible_start, visible_end: query t sees keys [start, end); bounds outside [0, S] are clamped, start == end is empty.
        k_scale, activation: as in `index_scores`.
        forced_sink, forced_local: so many of the first and of the last visible keys are selected whatever their scores; the
            others of the topk are those of the highest score among the rest. Fewer than topk together.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        topk_indices, int32, canonical: exact top-k, ascending by position, -1 after the last valid one (fewer visible keys
        than topk). Equal scores go to the lower position, with -0.0 equal to 0.0. A NaN or -inf score of a visible key
        counts as the lowest finite number: such keys are taken last, lower position first. Invisible keys never matter,
        whatever they hold.

    Raises:
        ValueError: shapes or dtypes that do not fit, topk below 1, or a known start > end.
        NotImplementedError: what the implementation asked for does not cover.

    Source: DeepSeek-V3.2-Exp report, section 1, equation 2. The order, the tie rule and the forced keys are ours.
    """
    run = _dispatch.choose("index_topk", implementation, _TOPK, platform=_dispatch.traced_platform())
    arrays = vary_alike(q_index, k_index, weights, k_scale, visible_start, visible_end)
    q_index, k_index, weights, scale, visible_start, visible_end = jax.lax.stop_gradient(arrays)
    portable = reference.index_topk, xla.index_topk
    ranges, n_keys = (visible_start, visible_end), k_index.shape[1]
    options = activation_options("index_topk", activation, run, portable, q_index, k_index, *ranges, implementation)
    if not (forced_sink or forced_local):
        return run(q_index, k_index, weights, *ranges, topk=topk, k_scale=scale, **options)
    forced = forced_sink, forced_local
    scored = scored_range(*ranges, *forced, n_keys)
    chosen = run(q_index, k_index, weights, *scored, topk=topk - sum(forced), k_scale=scale, **options)
    return with_forced(chosen, scored, *ranges, *forced, n_keys)
