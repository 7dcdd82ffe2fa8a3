"""Public ops: index scores and the exact top-k selection over them."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import checks as _checks
from pallas_kernels.common import dispatch as _dispatch
from pallas_kernels.common.mesh import split_like, vary_alike
from pallas_kernels.common.topk import with_forced
from pallas_kernels.index_topk import mosaic_gpu, pallas_gpu, reference, triton_gpu, xla
from pallas_kernels.types import NO_FORCED_KEYS, ForcedKeys, IndexHeads, Visible

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


def check_topk_implementation(op: str, implementation: str | None, activation: str) -> dict[str, str]:
    """Options for the implementation of `index_topk` that is to run for `op`.

    Raises:
        ValueError: for a name that is not an implementation's.
        NotImplementedError: for one that does not exist, or lacks the activation.
    """
    name = _dispatch.resolve_implementation(op, implementation, _TOPK, platform=_dispatch.traced_platform())
    portable = reference.index_topk, xla.index_topk
    return _dispatch.activation_option(op, activation, _TOPK[name], portable, implementation)


def _check_scores(index, visible, k_scale, activation, **_):
    _checks.check_index("index_scores", index, k_scale, fp8=True)
    _checks.check_visible("index_scores", visible, *index.q.shape[:2])
    _checks.check_activation("index_scores", activation)


@_checks.checked(_check_scores)
@split_like("index", 2)
def index_scores(
    index: IndexHeads,
    visible: Visible,
    *,
    k_scale: Float[Array, "B S"] | None = None,
    activation: str = "relu",
    implementation: str | None = None,
) -> Float[Array, "B T S"]:
    """Scores of the lightning indexer: how much query t wants key s.

    `score[t, s] = k_scale[s] * sum_h weights[t, h] * relu(q[t, h] . k[s])`. The result holds T x S elements: it is
    meant for inspection and tests, `index_topk` never builds it.

    Args:
        index: queries and keys in a float dtype, or both e4m3, as `quantize.quantize_fp8` makes them; the scale of each e4m3
            query is then folded into its weights, too.
        visible: query t sees keys [start, end); bounds outside [0, S] are clamped, start == end is empty.
        k_scale: positive scale of each key, 1 when left out; exact where it is a power of two.
        activation: "relu" as in the source, or "none", which weighs the dot products themselves.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        Scores, accumulated and returned in float32 (float64 for float64 inputs), -inf where the key is invisible.
        Differentiable; the gradient of the ReLU at 0 is 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a known start > end.
        NotImplementedError: an implementation that has no other activation than the ReLU.

    Source: DeepSeek-V3.2-Exp report, section 1, equation 1. The activation "none" is ours.
    """
    run = _dispatch.choose_implementation("index_scores", implementation, _SCORES)
    portable = reference.index_scores, xla.index_scores
    options = _dispatch.activation_option("index_scores", activation, run, portable, implementation)
    index, visible, k_scale = vary_alike(index, visible, k_scale)
    return run(index, visible, k_scale=k_scale, **options)


def _check_topk(index, visible, topk, forced, activation, k_scale, **_):
    _checks.check_index("index_topk", index, k_scale, fp8=True)
    _checks.check_topk("index_topk", topk)
    _checks.check_forced("index_topk", topk, forced)
    _checks.check_visible("index_topk", visible, *index.q.shape[:2])
    _checks.check_activation("index_topk", activation)


@_checks.checked(_check_topk)
@split_like("index", 2)
def index_topk(
    index: IndexHeads,
    visible: Visible,
    *,
    topk: int,
    forced: ForcedKeys = NO_FORCED_KEYS,
    activation: str = "relu",
    k_scale: Float[Array, "B S"] | None = None,
    implementation: str | None = None,
) -> Int32[Array, "B T {topk}"]:
    """The `topk` visible keys with the highest index score, per query; one selection shared by all attention heads.

    Scores as in `index_scores`. Carries no gradient.

    Args:
        index, k_scale, activation: as in `index_scores`; a positive factor in the weights never changes the selection.
        visible: query t sees keys [start, end); bounds outside [0, S] are clamped, start == end is empty.
        topk: selected keys per query (k in the paper); may exceed S.
        forced: how many of the first and of the last visible keys are selected whatever their scores, fewer than topk together;
            the others of the topk are those of the highest score among the rest.
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
    run = _dispatch.choose_implementation("index_topk", implementation, _TOPK)
    options = check_topk_implementation("index_topk", implementation, activation)
    index, visible, k_scale = jax.lax.stop_gradient(vary_alike(index, visible, k_scale))
    select = lambda visible, topk: run(index, visible, topk=topk, k_scale=k_scale, **options)
    return with_forced(visible, forced, index.k.shape[1], select, topk)
