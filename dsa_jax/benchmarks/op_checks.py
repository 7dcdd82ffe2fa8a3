"""Correctness of an op on this device: against its reference, which runs here too, in float32."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsa_jax.benchmarks.op_calls import Arrays, make_call, make_inputs
from dsa_jax.costs.ops import OpShape

_PER_QUERY = ("q_index", "weights", "visible_start", "visible_end", "q", "topk_indices", "d_out", "d_lse", "lse", "d_kl")
_PER_KEY_RESULTS = ("d_k", "d_v", "d_k_index")
_COTANGENTS = ("d_out", "d_lse", "d_kl")
_HOSTILE = (np.iinfo(np.int32).min, -123456, -1, 1 << 20, np.iinfo(np.int32).max)
_FLOAT32 = 1e-5


class CheckError(RuntimeError):
    """An op differs from its reference: the message says which result and by how much."""


def check_reduced(op: str, shape: OpShape, implementation: str, *, small: bool = False) -> str:
    """Checks few queries and keys of the same geometry, with absent keys, queries that see nothing and hostile indices; where
    keys are scored, one is NaN.

    Args:
        small: at sizes for a kernel that is interpreted.

    Returns:
        The compared results, as text.

    Raises:
        CheckError: for a result that differs from the reference.
        NotImplementedError: where the implementation does not cover the call.
    """
    reduced = shape.reduced(5, 70, 24) if small else shape.reduced(64, 1100, 512)
    return _check(op, reduced, implementation, _hostile(make_inputs(op, reduced, seed=1)), sample=None)


def check_real(op: str, shape: OpShape, implementation: str, *, queries: int = 64) -> str:
    """As `check_reduced`, at the whole shape: all queries are computed, so many of them compared, and all keys' gradients."""
    arrays = make_inputs(op, shape, seed=2)
    sample = _sample(shape, queries)
    chosen = jnp.zeros(shape.queries, bool).at[sample].set(True)
    for name in _COTANGENTS:
        if name in arrays:
            mask = chosen.reshape(1, -1, *(1,) * (arrays[name].ndim - 2))
            arrays[name] = jnp.where(mask, arrays[name], 0)
    return _check(op, shape, implementation, arrays, sample)


def _check(op: str, shape: OpShape, implementation: str, arrays: Arrays, sample: np.ndarray | None) -> str:
    run = jax.jit(make_call(op, shape, implementation))
    actual = run(**arrays)
    if implementation.endswith("_ordered"):
        again = run(**arrays)
        for name, x in actual.items():
            if not np.array_equal(np.asarray(x), np.asarray(again[name]), equal_nan=True):
                raise CheckError(f"{op}, {implementation}: {name} has other bits in a second run; expected the same.")
    return _compare_results(op, shape, implementation, actual, arrays, sample)


def check_peer(op: str, shape: OpShape, name: str, results: Callable[[OpShape, Arrays], Arrays]) -> str:
    """Checks another library's kernel: at reduced sizes as `check_reduced` does, then at `shape` as `check_real` does.

    Dense attention of others sees all keys: it is not given ranges. They need not return every result of the op.

    Args:
        results: from shape and arrays to some or all of the op's results, by name.

    Raises:
        CheckError: for a result that differs from the reference, or none at all.
    """
    reduced = shape.reduced(64, 1100, 512)
    arrays = make_inputs(op, reduced, seed=1)
    arrays = arrays if op == "dense_attention" else _hostile(arrays)
    _compare_results(op, reduced, name, results(reduced, arrays), arrays, None)
    arrays = make_inputs(op, shape, seed=2)
    return _compare_results(op, shape, name, results(shape, arrays), arrays, _sample(shape))


def _sample(shape: OpShape, queries: int = 64) -> np.ndarray:
    """Positions of the queries that are compared, evenly spaced."""
    return np.unique(np.linspace(0, shape.queries - 1, min(queries, shape.queries)).astype(np.int32))


def _compare_results(
    op: str, shape: OpShape, implementation: str, actual: Arrays, arrays: Arrays, sample: np.ndarray | None
) -> str:
    given = {name: _widened(x if sample is None or name not in _PER_QUERY else x[:, sample]) for name, x in arrays.items()}
    expected = jax.jit(make_call(op, shape, "reference"))(**given)
    if not actual.keys() & expected.keys():
        raise CheckError(f"{op}, {implementation}: no result; expected some of {', '.join(expected)}.")
    for name, want in expected.items():
        if name not in actual:
            continue
        got = actual[name] if sample is None or name in _PER_KEY_RESULTS else actual[name][:, sample]
        compare(f"{op}, {implementation}: {name}", np.asarray(got), np.asarray(want), *_limits(op, name, shape.dtype))
    compared = shape.queries if sample is None else len(sample)
    return f"{', '.join(x for x in expected if x in actual)}: {compared} of {shape.queries} queries, {shape.keys} keys"


def _widened(x: Array) -> Array:
    return x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x


def _hostile(arrays: Arrays) -> Arrays:
    rng = np.random.default_rng(0)
    changed: dict[str, Any] = dict(arrays)
    if "topk_indices" in arrays:
        indices = np.array(arrays["topk_indices"])
        indices = np.where(rng.random(indices.shape) < 0.2, rng.choice(_HOSTILE, indices.shape), indices)
        if indices.shape[1] > 1:
            indices[:, 0] = -1
        changed["topk_indices"] = jnp.asarray(indices, jnp.int32)
    if "visible_end" in arrays:
        n_keys = arrays["k_index" if "k_index" in arrays else "k"].shape[1]
        # Somewhat before the first key and behind the last: bounds are clamped.
        bounds = np.sort(rng.integers(-3, n_keys + 4, (2, *arrays["visible_end"].shape)), 0)
        bounds[:, :, -1] = [[0], [n_keys]]
        if bounds.shape[2] > 1:
            bounds[:, :, 0] = n_keys // 2
        changed["visible_start"], changed["visible_end"] = (jnp.asarray(x, jnp.int32) for x in bounds)
    if "k_index" in arrays and "q" not in arrays:
        changed["k_index"] = arrays["k_index"].at[:, arrays["k_index"].shape[1] // 3].set(jnp.nan)
    return changed


def _limits(op: str, name: str, dtype: str) -> tuple[float, float, float]:
    """(absolute, relative to each element, cosine distance), each of which must hold, the first two as alternatives.

    Source: the published tests of FlashMLA (attention), DeepGEMM (scores) and TileLang (gradients).
    """
    if name == "selection":
        return 0.0, 0.0, 0.0
    if name == "lse":
        return 1e-6, (8.01 if op == "decode_fp8" else 2.01) / 65536, 1.0
    if dtype == "float32":
        return _FLOAT32, 0.0, 1e-9
    if name == "scores":
        return float("inf"), 0.0, 5e-6
    if name == "out":
        return (1e-3, 2.01 / 128, 5e-6) if op == "decode_fp8" else (8e-4, 3.01 / 128, 7e-6)
    return float("inf"), 0.0, 1e-4


def compare(what: str, got: np.ndarray, want: np.ndarray, absolute: float, relative: float, cosine: float) -> None:
    """Raises CheckError unless `got` is `want` within the limits; inf and nan must stand at the same places.

    Args:
        absolute: scaled by the largest expected magnitude, where that is above 1 and `relative` is 0.
    """
    if got.shape != want.shape:
        raise CheckError(f"{what} has shape {got.shape}; expected {want.shape}.")
    got, want = got.astype(np.float64), want.astype(np.float64)
    for kind, test in (("nan", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = np.argwhere(test(got) != test(want))
        if len(wrong):
            raise CheckError(f"{what}: {len(wrong)} elements are {kind} in only one of both, the first at {tuple(wrong[0])}.")
    finite = np.isfinite(want)
    x, y = np.where(finite, got, 0), np.where(finite, want, 0)
    largest = 1.0 if relative else max(1.0, np.abs(y).max(initial=0))
    error = np.abs(x - y)
    excess = error - np.maximum(absolute * largest, relative * np.abs(y))
    if (excess > 0).any():
        worst = np.unravel_index(excess.argmax(), excess.shape)
        raise CheckError(
            f"{what}: {x[worst]} at {tuple(map(int, worst))}; expected {y[worst]}, {np.mean(excess <= 0):.2%} are in bounds."
        )
    size = (x * x).sum() + (y * y).sum()
    distance = 1 - 2 * (x * y).sum() / size if size else 0.0
    if distance > cosine:
        raise CheckError(f"{what}: the cosine distance is {distance:.2e}; expected at most {cosine:.0e}.")
