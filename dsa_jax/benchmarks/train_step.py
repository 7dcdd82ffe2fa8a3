"""Time and peak memory of one sparse-stage update at several sequence lengths, each in a process of its own."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

from dsa_jax.config import Config, StageConfig


def _peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def recipe(length: int, topk: int) -> Config:
    """The small model and its sparse stage, of one sequence of `length` tokens."""
    config = Config()
    config.model.max_positions = length
    config.model.remat = "full"
    config.model.attention.indexer.enabled = True
    config.model.attention.indexer.n_heads = 4
    config.model.attention.indexer.head_dim = 32
    config.model.attention.indexer.rope_dim = 32
    config.model.attention.indexer.topk = topk
    config.train.sparse = StageConfig(steps=3, batch_size=1, seq_len=length)
    return config


def _opening(length: int, topk: int) -> str:
    from dsa_jax.opening import opening_of

    return opening_of(recipe(length, topk))


def measure(length: int, topk: int) -> dict[str, Any]:
    """Run three sparse-stage updates of a small model on one sequence of `length` random tokens, in this process.

    Returns:
        length, topk, first_step_seconds (with compilation), seconds (best of the following two), peak_bytes of the process
        and baseline_bytes (its size before the first update, with libraries loaded and parameters made).
    """
    import jax
    import numpy as np

    from dsa_jax.data import Batch
    from dsa_jax.model import build_model, init_params
    from dsa_jax.train.stages import SPARSE
    from dsa_jax.train.step import init_state, make_train_step

    config = recipe(length, topk)
    config.validate()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, (1, length + 1), dtype=np.int32)
    ones = np.ones((1, length), np.int32)
    batch = jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(bool), ones))
    model = build_model(config.model)
    params = init_params(model, jax.random.key(0))
    state = init_state(params, SPARSE, config.train.sparse)
    step = make_train_step(model, SPARSE, config)
    baseline = _peak_bytes()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return {
        "op": "train_step",
        "length": length,
        "topk": topk,
        "first_step_seconds": seconds[0],
        "seconds": min(seconds[1:]),
        "peak_bytes": _peak_bytes(),
        "baseline_bytes": baseline,
        "loss": float(metrics["loss"]),
        "kl": float(metrics["kl"]),
    }


def run(lengths: Sequence[int], topk: int = 512, *, report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """`measure` each length in a fresh process, so that one peak does not hide another.

    `report` gets the opening line, and the table at the end. This process takes no accelerator from those that measure.
    """
    context = multiprocessing.get_context("spawn")
    rows = []
    with context.Pool(1) as pool:
        report(pool.apply(_opening, (lengths[0], topk)))
    for length in lengths:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (length, topk)))
    report(format_table(rows))
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A table of `run`'s rows, with the peak of each length relative to the one before."""
    lines = [
        f"{'length':>8} {'topk':>6} {'s/step':>8} {'first step s':>13} {'peak MiB':>9} {'start MiB':>10} {'peak ratio':>11}"
    ]
    for before, row in zip([None, *rows], rows, strict=False):
        ratio = f"{row['peak_bytes'] / before['peak_bytes']:.2f}" if before else ""
        lines.append(
            f"{row['length']:>8} {row['topk']:>6} {row['seconds']:>8.2f} {row['first_step_seconds']:>13.2f} "
            f"{row['peak_bytes'] / 2**20:>9.0f} {row['baseline_bytes'] / 2**20:>10.0f} {ratio:>11}"
        )
    return "\n".join(lines)
