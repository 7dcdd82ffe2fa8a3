"""Public op: the indexer's loss, a KL divergence from the attention distribution."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.common import checks as _checks
from pallas_kernels.common import dispatch as _dispatch
from pallas_kernels.common.mesh import split_like, vary_over, varying_axes
from pallas_kernels.common.topk import over_filled_slots
from pallas_kernels.indexer_loss import pallas_gpu, reference, xla
from pallas_kernels.types import IndexHeads, Visible

_IMPLEMENTATIONS = {"reference": reference.indexer_kl, "xla": xla.indexer_kl, "pallas": pallas_gpu.indexer_kl}


def _check_kl(index, visible, q, k, lse, softmax_scale, topk_indices, activation, keys_per_index_key, head_axis, **_):
    _checks.check_index("indexer_kl", index)
    _checks.check_attention_arguments("indexer_kl", q, k)
    _checks.check_shape("indexer_kl", "q", q, (*index.q.shape[:2], None, None), "[B, T] of index.q, heads, head dim")
    is_count = _checks.is_whole(keys_per_index_key) and keys_per_index_key >= 1
    if not is_count or (keys_per_index_key > 1 and topk_indices is not None):
        raise ValueError(
            f"indexer_kl: keys_per_index_key is {_checks.shown(keys_per_index_key)}; expected a positive whole number, 1 "
            "with topk_indices."
        )
    batch, n_index_keys = index.k.shape[:2]
    lengths = batch, n_index_keys * keys_per_index_key, None, None
    _checks.check_shape("indexer_kl", "k", k, lengths, "[B, S] of index.k (S times keys_per_index_key), key heads, head dim")
    _checks.check_lse("indexer_kl", lse, q)
    _checks.check_visible("indexer_kl", visible, *index.q.shape[:2])
    _checks.check_scale("indexer_kl", softmax_scale)
    _checks.check_activation("indexer_kl", activation)
    _checks.check_axis("indexer_kl", head_axis)
    if topk_indices is not None:
        _checks.check_topk_indices("indexer_kl", topk_indices, *index.q.shape[:2])


@_checks.checked(_check_kl)
@split_like("index", 2)
def indexer_kl(
    index: IndexHeads,
    visible: Visible,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S G Dk"],
    lse: Float[Array, "B T H"],
    *,
    softmax_scale: float,
    topk_indices: Int32[Array, "B T K"] | None = None,
    activation: str = "relu",
    keys_per_index_key: int = 1,
    head_axis: str | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T"]:
    """KL(p || softmax(index score)) per query, in nats.

    p is the attention probability `exp(softmax_scale * q . k - lse)` summed over heads and L1-normalised over the set; the
    softmax runs over the same set. The set is every visible key (topk_indices None: warm-up), or the selected keys that are
    visible. Gradient reaches `index` only: q, k and lse are the constant target. With g the gradient
    in the score, g = softmax(score) - p on the set and 0 elsewhere; the gradient of the ReLU at 0 is 0. Once and in reverse
    mode; "reference" has every derivative.

    Args:
        index: one index key for each key, N = S, unless `keys_per_index_key` says otherwise. The static scales in the weights
            are the temperature of the softmax here.
        visible: query t sees keys [start, end); bounds outside [0, S] are clamped, start == end is empty.
        lse: natural log-sum-exp of the attention performed: the dense one in warm-up, that of `sparse_attention` for a
            selection. It weighs the heads against each other; p sums to 1 in any case.
        topk_indices: any order; indices outside [0, S) count as absent; a row must not list a key twice.
        activation: of the index score, as in `index_scores`.
        keys_per_index_key: how many consecutive keys have one index key, and so one score; S is N times that. The dot
            products with an index key are then computed once ("xla"; the others repeat the index key).
        head_axis: inside `shard_map`, the mesh axis over which the heads of q and lse are split; the sum over heads runs over
            its devices too, so that all of them return the same. The index arguments must be equal on them.
        deterministic: the same gradients, bit by bit, every run on a GPU, too; slower with a selection, see `sparse_attention`.
        implementation: see `pallas_kernels.IMPLEMENTATIONS`; None is the default of the device.

    Returns:
        kl [B, T], float32 (float64 for float64 inputs). An empty set, or one whose probabilities all underflow: 0 with zero
        gradient. Keys outside every query's set never matter, whatever they hold.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a known start > end.
        NotImplementedError: what the implementation asked for does not cover.

    Source: DeepSeek-V3.2-Exp report, section 2.1.
    """
    run = _dispatch.choose_implementation("indexer_kl", implementation, _IMPLEMENTATIONS)
    options: dict[str, Any] = _dispatch.same_bits("indexer_kl", run, pallas_gpu.indexer_kl, deterministic)
    options |= _dispatch.activation_option(
        "indexer_kl", activation, run, (reference.indexer_kl, xla.indexer_kl), implementation
    )
    own, target = (index, visible, topk_indices), (q, k, lse)
    target = jax.lax.stop_gradient(vary_over(varying_axes(own, target), target))
    # Where the heads of the target are split, the sum over them is the same on every device.
    index, visible, topk_indices = vary_over(varying_axes(own) | varying_axes(target) - {head_axis}, own)
    options |= {"softmax_scale": float(softmax_scale), "head_axis": head_axis, "keys_per_index_key": keys_per_index_key}
    measure = lambda indices: run(index, visible, *target, topk_indices=indices, **options)
    return measure(None) if topk_indices is None else over_filled_slots(measure, topk_indices, k.shape[1])
