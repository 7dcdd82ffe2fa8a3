"""Times one attention layer, sparse against dense, prefill and decode, in one process; and where the sparse time goes.

The layer is latent attention in its absorbed form: every head reads the same keys, whose leading channels are the values.
Projections are left out, they are the same on both sides. Dense is timed in the same form: with the value width equal to
the latent width, expanding keys and values per head would cost as many multiplications and more memory traffic.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsa_jax.benchmarks.op_calls import index_heads, visible
from pallas_kernels import dense_attention, index_topk, index_topk_coarse_to_fine, sparse_attention
from pallas_kernels.sparse_attention.xla import gather_rows, with_zero_row

Row = dict[str, Any]

# Logits of all heads that `jax.nn.dot_product_attention` holds at once; beyond this it is skipped.
MAX_LOGIT_BYTES = 6 * 2**30

# Keys per block where blocks are chosen first, of which a quarter of the keys are then scored one by one.
COARSE_BLOCK = 128


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the layer; batch is 1 and the mask causal."""

    n_heads: int = 32
    latent_dim: int = 128  # also the width of the values
    rope_dim: int = 32
    n_index_heads: int = 8
    index_head_dim: int = 32
    topk: int = 512

    @property
    def key_dim(self) -> int:
        """Channels of one key."""
        return self.latent_dim + self.rope_dim

    @property
    def softmax_scale(self) -> float:
        """Multiplier of q . k."""
        return self.key_dim**-0.5


def run(
    lengths: Sequence[int], repeats: int = 3, *, shape: LayerShape | None = None, report: Callable[[str], None] = print
) -> list[Row]:
    """Measures prefill of every length and decode of one token after it.

    Args:
        lengths: context lengths, in tokens.
        repeats: timed calls per measurement, after one that warms up; a first call of more than 20 seconds is the measurement.
        shape: sizes of the layer; None is 32 heads, latent 128 + 32, indexer 8 x 32, topk 512.
        report: receives one line per measurement, and the reason for each that is left out.

    Returns:
        Rows {op, phase, implementation, length, seconds, spread, share_of}: `seconds` is the median, `spread` the distance of
        the first from the last decile (of the extremes below ten repeats) over the median, `share_of` names the row that a part
        belongs to (None for whole layers). Rows of op "speedup" carry `ratio`, the better dense time over the sparse one.
    """
    shape = shape or LayerShape()
    rows: list[Row] = []
    for length in lengths:
        arrays = _inputs(shape, length)
        rows += _phase("prefill", arrays, shape, length, repeats, report)
        last = {name: x[:, -1:] if name in _PER_QUERY else x for name, x in arrays.items()}
        rows += _phase("decode", last, shape, length, max(200, repeats), report)
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, times in milliseconds."""
    lines = [f"{'phase':8} {'length':>7}  {'op':28} {'implementation':30} {'ms':>12} {'spread':>7}"]
    for row in rows:
        if row["op"] == "speedup":
            lines.append(f"{row['phase']:8} {row['length']:7d}  sparse is {row['ratio']:.2f} times as fast as the better dense")
        else:
            name = ("  " if row["share_of"] else "") + row["op"]
            times = f"{row['seconds'] * 1e3:12.2f} {row['spread']:7.0%}"
            lines.append(f"{row['phase']:8} {row['length']:7d}  {name:28} {row['implementation']:30} {times}")
    return "\n".join(lines)


_PER_QUERY = ("q", "q_index", "weights", "visible_start", "visible_end")


def _inputs(shape: LayerShape, length: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)

    def normal(*size: int) -> Array:
        return jnp.asarray(rng.standard_normal(size, np.float32))

    return {
        "q_index": normal(1, length, shape.n_index_heads, shape.index_head_dim),
        "k_index": normal(1, length, shape.index_head_dim),
        "weights": normal(1, length, shape.n_index_heads),
        "q": normal(1, length, shape.n_heads, shape.key_dim),
        "k": normal(1, length, 1, shape.key_dim),
        "visible_start": jnp.zeros((1, length), jnp.int32),
        "visible_end": jnp.arange(1, length + 1, dtype=jnp.int32)[None],
    }


def _phase(
    phase: str, arrays: dict[str, Array], shape: LayerShape, length: int, repeats: int, report: Callable[[str], None]
) -> list[Row]:
    rows: list[Row] = []

    def measure(op: str, implementation: str, call: Callable[..., Any], given: dict[str, Array], share_of: str | None) -> float:
        seconds, spread = _time(call, given, repeats)
        row = {"op": op, "phase": phase, "implementation": implementation, "length": length}
        rows.append(row | {"seconds": seconds, "spread": spread, "share_of": share_of})
        report(format_table(rows[-1:]).splitlines()[1])
        return seconds

    def select(**given: Array) -> Array:
        return index_topk(index_heads(given), visible(given), topk=shape.topk, implementation="xla")

    def select_by_blocks(**given: Array) -> Array:
        options: dict[str, Any] = {"block_size": COARSE_BLOCK, "n_blocks": max(1, length // (4 * COARSE_BLOCK) - 2)}
        options |= {"topk": shape.topk, "implementation": "xla"}
        return index_topk_coarse_to_fine(index_heads(given), visible(given), **options)

    def score(**given: Array) -> Array:
        return index_topk(index_heads(given), visible(given), topk=1, implementation="xla")

    def attend(q: Array, k: Array, topk_indices: Array, **_: Array) -> Array:
        return sparse_attention(
            q, k, None, topk_indices, softmax_scale=shape.softmax_scale, d_v=shape.latent_dim, implementation="xla"
        ).out

    def gather(q: Array, k: Array, topk_indices: Array, **_: Array) -> Array:
        padded = with_zero_row(k)

        def one(indices: Array) -> Array:
            return gather_rows(padded, indices[None, None])[0].sum((0, 1, 2, 3))

        return jax.lax.map(one, topk_indices[0])

    def sparse(**given: Array) -> Array:
        return attend(topk_indices=select(**given), **given)

    def dense(q: Array, k: Array, **given: Array) -> Array:
        options: dict[str, Any] = {"softmax_scale": shape.softmax_scale, "d_v": shape.latent_dim, "implementation": "xla"}
        return dense_attention(q, k, None, visible(given), **options).out

    def library(q: Array, k: Array, **_: Array) -> Array:
        # It wants values as wide as keys; the rope channels of the result are dropped.
        out = jax.nn.dot_product_attention(q, k, k, scale=shape.softmax_scale, is_causal=phase == "prefill")
        return out[..., : shape.latent_dim]

    whole = measure("sparse layer", "xla", sparse, arrays, None)
    selected = arrays | {"topk_indices": jax.jit(select)(**arrays)}
    scoring = measure("scores, and their maximum", "xla", score, arrays, "sparse layer")
    choosing = measure("scores and selection", "xla", select, arrays, "sparse layer")
    measure("the same, coarse to fine", "xla", select_by_blocks, arrays, "sparse layer")
    # Negative when the machine was busier during the first of the two: the split is then not resolved, and says so.
    alone = f"{(choosing - scoring) * 1e3:.2f} ms" if choosing > scoring else "not resolved, the machine is too noisy"
    report(f"{phase:8} {length:7d}    selection alone, by difference: {alone}")
    measure("gather, and its sum", "xla", gather, selected, "sparse layer")
    measure("gather and attend", "xla", attend, selected, "sparse layer")
    best = measure("dense layer", "xla", dense, arrays, None)
    logit_bytes = 4 * shape.n_heads * arrays["q"].shape[1] * length
    if logit_bytes <= MAX_LOGIT_BYTES:
        best = min(best, measure("dense layer", "jax.nn.dot_product_attention", library, arrays, None))
    else:
        report(
            f"{phase:8} {length:7d}  jax.nn.dot_product_attention left out: its logits take {logit_bytes / 2**30:.0f} GiB, "
            f"more than {MAX_LOGIT_BYTES / 2**30:.0f}"
        )
    rows.append({"op": "speedup", "phase": phase, "implementation": "xla", "length": length, "ratio": best / whole})
    report(format_table(rows[-1:]).splitlines()[1])
    return rows


def _time(call: Callable[..., Any], given: dict[str, Array], repeats: int) -> tuple[float, float]:
    """(median seconds, spread) of `repeats` calls, compilation not counted."""
    compiled = jax.jit(call).lower(**given).compile()

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(**given))
        return time.perf_counter() - start

    first = once()
    if first > 20:
        return first, 0.0
    seconds = sorted(once() for _ in range(repeats))
    tenth = len(seconds) // 10
    median = statistics.median(seconds)
    return median, (seconds[-1 - tenth] - seconds[tenth]) / median
