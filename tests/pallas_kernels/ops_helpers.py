"""Inputs, visible ranges and comparisons shared by the op tests."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Visible

IMPLEMENTATIONS = ("reference", "xla")

# Relative to the largest expected magnitude: float32 leaves room for sums of ~1000 products, bfloat16 keeps 8 bits.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float64": 1e-12}


def normal(rng, *shape, dtype=np.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def small_integers(rng, *shape):
    """Floats whose products and sums are exact in any order, with many equal scores."""
    return jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)


def ranges(kind, batch, queries, keys, seed=0):
    rng = np.random.default_rng(seed)
    position = np.arange(queries)
    if kind == "causal":
        start, end = np.zeros(queries, int), np.clip(position + 1 + max(0, keys - queries), 0, keys)
    elif kind == "packed":
        start = (position // 13) * 13
        end = position + 1
    elif kind == "random":
        bounds = np.sort(rng.integers(-3, keys + 4, (batch, queries, 2)), -1)
        start, end = bounds[..., 0], bounds[..., 1]
    elif kind == "mostly_empty":
        start = np.full((batch, queries), keys // 2)
        end = start + (rng.random((batch, queries)) < 0.2) * 3
    else:
        raise KeyError(kind)
    start, end = (np.minimum(np.broadcast_to(x, (batch, queries)), keys + 4) for x in (np.minimum(start, end), end))
    return Visible(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))


RANGE_KINDS = ("causal", "packed", "random", "mostly_empty")


def clipped(visible, keys):
    start, end = (np.clip(np.asarray(bound), 0, keys) for bound in visible)
    return start, end


def in_float64(function, *arrays, **kwargs):
    """Runs `function` on float64 copies of the floating arrays, or bundles of them, and returns numpy results."""
    with jax.enable_x64(True):
        is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
        widened = lambda x: jnp.asarray(np.asarray(x, np.float64 if is_float(x) else None)) if isinstance(x, jax.Array) else x
        wide, kwargs = jax.tree.map(widened, (arrays, kwargs))
        return jax.tree.map(np.asarray, jax.jit(lambda *a, kw: function(*a, **kw))(*wide, kw=kwargs))


def assert_close(actual, expected, dtype="float32", what="result"):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    for name, test in (("nan", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        np.testing.assert_array_equal(test(actual), test(expected), err_msg=f"{what}: positions of {name}")
    finite = np.isfinite(expected)
    if not finite.any():
        return
    error = np.abs(np.where(finite, actual, 0) - np.where(finite, expected, 0))
    limit = TOLERANCE[dtype] * max(1.0, np.abs(expected[finite]).max())
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= limit, (
        f"{what}: worst at {worst}: {actual[worst]} against {expected[worst]}, {np.mean(error <= limit):.1%} within {limit:.1e}"
    )


def arrays_with(jaxpr, size):
    """Names of the primitives of a program, loops and branches included, that make an array with an axis of `size`."""
    found = []
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [part for part in parts if hasattr(part, "eqns")]
        found += [name for part in inner for name in arrays_with(part, size)]
        if not inner and any(size in getattr(out.aval, "shape", ()) for out in equation.outvars):
            found.append(equation.primitive.name)
    return found
