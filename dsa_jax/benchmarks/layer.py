"""Times one attention layer, sparse against dense, prefill and decode, in one process, and the parts of the sparse one.

The layer is latent attention in its absorbed form: every head reads the same keys, whose leading channels are the values.
Projections are left out, they are the same on both sides. Dense is timed in the same form: with the value width equal to
the latent width, expanding keys and values per head would cost as many FLOPs and more memory traffic.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsa_jax.benchmarks import timing
from dsa_jax.benchmarks.op_calls import Arrays, index_heads, make_call, visible
from dsa_jax.costs.ops import OpShape
from pallas_kernels import index_topk_coarse_to_fine
from pallas_kernels.sparse_attention.xla import gather_rows, with_zero_row

Row = dict[str, Any]

# Logits of all heads that `jax.nn.dot_product_attention` holds at once; beyond this it is skipped.
MAX_LOGIT_BYTES = 6 * 2**30

# Keys per block where blocks are chosen first, of which a quarter of the keys are then scored one by one.
COARSE_BLOCK = 128

LAYER = OpShape(1, 1, 512, heads=32, dim=128 + 32, d_v=128, index_heads=8, index_dim=32, dtype="float32")
"""Sizes of the layer; queries and keys are as many as the context is long."""


def run(
    lengths: Sequence[int], repeats: int = 3, *, shape: OpShape = LAYER, report: Callable[[str], None] = print
) -> list[Row]:
    """Measures prefill of every length and decode of one token after it, with a causal mask.

    Args:
        lengths: context lengths, in tokens.
        repeats: timed calls per measurement, after some that warm up; a call of more than 20 seconds is the measurement.
        shape: sizes of the layer, of which heads, channels and topk are read.
        report: receives one line per measurement, and the reason for each that is left out.

    Returns:
        Rows {op, phase, implementation, length, seconds, spread, share_of}: `seconds` is the median, `spread` the distance of
        the first from the last decile (of the extremes below ten repeats) over the median, `share_of` names the row that a part
        belongs to (None for whole layers). Rows of op "speedup" carry `ratio`, the better dense time over the sparse one.
    """
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


def _inputs(shape: OpShape, length: int) -> Arrays:
    rng = np.random.default_rng(0)

    def normal(*size: int) -> Array:
        return jnp.asarray(rng.standard_normal(size, np.float32))

    return {
        "q_index": normal(1, length, shape.index_heads, shape.index_dim),
        "k_index": normal(1, length, shape.index_dim),
        "weights": normal(1, length, shape.index_heads),
        "q": normal(1, length, shape.heads, shape.dim),
        "k": normal(1, length, 1, shape.dim),
        "visible_start": jnp.zeros((1, length), jnp.int32),
        "visible_end": jnp.arange(1, length + 1, dtype=jnp.int32)[None],
    }


def _phase(phase: str, arrays: Arrays, shape: OpShape, length: int, repeats: int, report: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []

    def measure(op: str, implementation: str, call: Callable[..., Any], given: Arrays, share_of: str | None) -> float:
        timed = timing.measure(lambda given: call(**given), (given,), repeats=repeats, warm_seconds=0.0, chain_below=0.0)
        row = {"op": op, "phase": phase, "implementation": implementation, "length": length, "share_of": share_of}
        rows.append(row | {"seconds": timed.seconds, "spread": (timed.p90 - timed.p10) / timed.seconds})
        report(format_table(rows[-1:]).splitlines()[1])
        return timed.seconds

    select_all, score = make_call("index_topk", shape, "xla"), make_call("index_topk", shape._replace(topk=1), "xla")
    attend_selected, attend_all = (make_call(op, shape, "xla") for op in ("sparse_attention", "dense_attention"))

    def select(**given: Array) -> Array:
        return select_all(**given)["selection"]

    def select_by_blocks(**given: Array) -> Array:
        options: dict[str, Any] = {"block_size": COARSE_BLOCK, "n_blocks": max(1, length // (4 * COARSE_BLOCK) - 2)}
        options |= {"topk": shape.topk, "implementation": "xla"}
        return index_topk_coarse_to_fine(index_heads(given), visible(given), **options)

    def attend(q: Array, k: Array, topk_indices: Array, **_: Array) -> Array:
        return attend_selected(q, k, topk_indices)["out"]

    def gather(q: Array, k: Array, topk_indices: Array, **_: Array) -> Array:
        padded = with_zero_row(k)

        def one(indices: Array) -> Array:
            return gather_rows(padded, indices[None, None])[0].sum((0, 1, 2, 3))

        return jax.lax.map(one, topk_indices[0])

    def sparse(**given: Array) -> Array:
        return attend(topk_indices=select(**given), **given)

    def dense(**given: Array) -> Array:
        return attend_all(**given)["out"]

    def library(q: Array, k: Array, **_: Array) -> Array:
        # It wants values as wide as keys; the rope channels of the result are dropped.
        out = jax.nn.dot_product_attention(q, k, k, scale=shape.dim**-0.5, is_causal=phase == "prefill")
        return out[..., : shape.width]

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
    logit_bytes = 4 * shape.heads * arrays["q"].shape[1] * length
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
