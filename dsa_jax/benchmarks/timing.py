"""Seconds of one call of a function of arrays, on the device."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Below this, what a call costs outside the device shows in a wall time.
CHAIN_BELOW_SECONDS = 1e-3
CHAIN_SECONDS = 0.02


class Timing(NamedTuple):
    """Median and deciles, how many repeats they are of, and how each was timed."""

    seconds: float
    p10: float
    p90: float
    repeats: int
    method: str


def measure(
    function: Callable[..., Any],
    arrays: Sequence[Any],
    *,
    repeats: int = 20,
    warm_seconds: float = 0.3,
    chain_below: float = CHAIN_BELOW_SECONDS,
) -> Timing:
    """Times `function(*arrays)`, compiled, after `warm_seconds` of calls.

    A call shorter than `chain_below` is timed in a loop inside one program, where every call waits for the one before.
    One longer than a second is repeated three times only.
    """
    compiled = jax.jit(function).lower(*arrays).compile()
    estimate = _warm(compiled, arrays, warm_seconds)
    if estimate >= chain_below:
        repeats = repeats if estimate < 1 else min(repeats, 3)
        return _summary([_once(compiled, arrays) for _ in range(repeats)], "block_until_ready")
    count = max(2, min(2000, int(CHAIN_SECONDS / estimate)))
    chain = jax.jit(lambda *given: _chain(function, given, count)).lower(*arrays).compile()
    _warm(chain, arrays, warm_seconds)
    return _summary([_once(chain, arrays) / count for _ in range(repeats)], f"chain of {count}")


def measure_events(
    call: Callable[[], Any],
    cuda: Any,
    *,
    repeats: int = 20,
    warm_seconds: float = 0.3,
    chain_below: float = CHAIN_BELOW_SECONDS,
) -> Timing:
    """Times `call()`, which puts work on the GPU through torch, by CUDA events; `cuda` is `torch.cuda`.

    A call shorter than `chain_below` is put there many times between two events, so that the GPU does not wait for the next.
    """

    def once(count: int) -> float:
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    spent, began = [once(1)], time.perf_counter()
    while time.perf_counter() - began < warm_seconds or len(spent) < 2:
        spent.append(once(1))
    estimate = max(min(spent), 1e-6)
    count = 1 if estimate >= chain_below else max(2, min(2000, int(CHAIN_SECONDS / estimate)))
    repeats = repeats if estimate < 1 else min(repeats, 3)
    return _summary([once(count) for _ in range(repeats)], "CUDA events" + (f" around {count}" if count > 1 else ""))


def _once(compiled: Callable[..., Any], arrays: Sequence[Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    return time.perf_counter() - start


def _warm(compiled: Callable[..., Any], arrays: Sequence[Any], seconds: float) -> float:
    """Calls until `seconds` have passed, twice at least unless one call takes as long; returns the shortest call."""
    spent = [_once(compiled, arrays)]
    while sum(spent) < seconds or (len(spent) < 2 and spent[0] < 1):
        spent.append(_once(compiled, arrays))
    return min(spent)


def _summary(seconds: list[float], method: str) -> Timing:
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered), method)


def _chain(function: Callable[..., Any], arrays: Sequence[Any], count: int) -> Any:
    """`count` calls in a row; each changes one number of the next one's input by an amount only known when it has run."""
    leaves, tree = jax.tree.flatten(tuple(arrays))
    fed = next(i for i, x in enumerate(leaves) if x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16))

    def step(_: Any, array: Any) -> Any:
        given = jax.tree.unflatten(tree, [*leaves[:fed], array, *leaves[fed + 1 :]])
        # The barrier keeps the compiler from computing only the numbers that are looked at.
        out = jax.lax.optimization_barrier(function(*given))
        looked_at = sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(out))
        first = (0,) * array.ndim
        return array.at[first].add(jnp.where(looked_at == 12345.678, 1, 0).astype(array.dtype))

    return jax.lax.fori_loop(0, count, step, leaves[fed])
