"""Seconds of one call of a function of arrays, on the device."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Below this, the overhead of a call outside the device shows in its wall time.
CHAIN_BELOW_SECONDS = 1e-3
CHAIN_SECONDS = 0.02
# A call as long as this is timed once.
LONG_SECONDS = 20.0


class Timing(NamedTuple):
    """Median and deciles in seconds, the number of repeats, and the method of `timing`.

    Deciles of fewer than ten repeats are the extremes.
    """

    seconds: float
    p10: float
    p90: float
    repeats: int
    timing: str


def measure(function: Callable[..., Any], arrays: Sequence[Any], **options: Any) -> Timing:
    """Times `function(*arrays)`, compiled; `options` are those of `_repeat`.

    A short call is timed in a loop inside one program, where every call waits for the one before.
    """

    def prepare(count: int) -> Callable[[], float]:
        looped = function if count == 1 else lambda *given: _chain(function, given, count)
        compiled = jax.jit(looped).lower(*arrays).compile()

        def once() -> float:
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arrays))
            return (time.perf_counter() - start) / count

        return once

    return _repeat(prepare, "block_until_ready", "chain of", **options)


def measure_events(call: Callable[[], Any], cuda: Any, **options: Any) -> Timing:
    """Times `call()`, which puts work on the GPU through torch, by CUDA events; `cuda` is `torch.cuda`.

    A short call is put there many times between two events, so that the GPU does not wait for the next. `options` are those of
    `_repeat`.
    """

    def prepare(count: int) -> Callable[[], float]:
        def once() -> float:
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            for _ in range(count):
                call()
            end.record()
            cuda.synchronize()
            return start.elapsed_time(end) / 1e3 / count

        return once

    return _repeat(prepare, "CUDA events", "CUDA events around", **options)


def _repeat(
    prepare: Callable[[int], Callable[[], float]],
    single: str,
    chained: str,
    *,
    repeats: int = 20,
    warm_seconds: float | None = None,
    chain_below: float = CHAIN_BELOW_SECONDS,
) -> Timing:
    """Timing by `prepare(count)`, which gives a function that makes `count` calls and returns the seconds of one.

    Args:
        single: name of the method for one call at a time; `chained` for several.
        repeats: three at most of a call longer than a second, one of a call longer than `LONG_SECONDS`.
        warm_seconds: of calls before the first that counts, two calls at least unless one takes a second; None is 0.3 s, and
            none for fewer than ten repeats.
        chain_below: seconds of a call that is too short to be timed alone.
    """
    if warm_seconds is None:
        warm_seconds = 0.3 if repeats >= 10 else 0.0
    once = prepare(1)
    estimate = max(_warm(once, warm_seconds), 1e-6)
    if estimate >= LONG_SECONDS:
        return _summary([estimate], single)
    count = 1 if estimate >= chain_below else max(2, min(2000, int(CHAIN_SECONDS / estimate)))
    if count > 1:
        once = prepare(count)
        _warm(once, warm_seconds)
    repeats = repeats if estimate < 1 else min(repeats, 3)
    return _summary([once() for _ in range(repeats)], single if count == 1 else f"{chained} {count}")


def _warm(once: Callable[[], float], seconds: float) -> float:
    """Calls until `seconds` have passed, twice at least unless one call takes a second; returns the shortest call."""
    began, spent = time.perf_counter(), [once()]
    while time.perf_counter() - began < seconds or (len(spent) < 2 and spent[0] < 1):
        spent.append(once())
    return min(spent)


def _summary(seconds: list[float], method: str) -> Timing:
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered), method)


def _chain(function: Callable[..., Any], arrays: Sequence[Any], count: int) -> Any:
    """`count` calls in a row; each changes one element of the next one's input by an amount only known when it has run."""
    leaves, tree = jax.tree.flatten(tuple(arrays))
    fed = next(i for i, x in enumerate(leaves) if x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16))

    def step(_: Any, array: Any) -> Any:
        given = jax.tree.unflatten(tree, [*leaves[:fed], array, *leaves[fed + 1 :]])
        # The barrier keeps the compiler from computing only the elements that are looked at.
        out = jax.lax.optimization_barrier(function(*given))
        looked_at = sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(out))
        first = (0,) * array.ndim
        return array.at[first].add(jnp.where(looked_at == 12345.678, 1, 0).astype(array.dtype))

    return jax.lax.fori_loop(0, count, step, leaves[fed])
