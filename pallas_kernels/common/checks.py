"""Argument checks shared by the ops. Every message says which argument, what it was, what was expected, what to do.

Arguments are whatever the caller passed, so that most are of any type.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.types import ForcedKeys, IndexHeads, Visible

P = ParamSpec("P")
R = TypeVar("R")

INT32 = 2**31 - 1
LONGEST_SHOWN = 80
ACTIVATIONS = ("relu", "none")
_BUNDLES = (ForcedKeys, IndexHeads, Visible)
_FLOATS = ("float16", "bfloat16", "float32", "float64")


def checked(check: Callable[..., None]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that passes a function's arguments, by name and with defaults, to `check` before anything else looks at them.

    A plain tuple of the right length is taken for the `Visible`, `IndexHeads` or `ForcedKeys` that the function declares.

    Where jaxtyping's import hook is installed it wraps the function inside this decorator, so that a caller's mistake ends in
    the message of `check` with or without the hook.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        bundles = {name: x.annotation for name, x in signature.parameters.items() if x.annotation in _BUNDLES}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, kind in bundles.items():
                bound.arguments[name] = _bundled(function.__name__, name, bound.arguments[name], kind)
            check(**bound.arguments)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _bundled(op: str, name: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`, one of the bundles of `pallas_kernels.types`."""
    if isinstance(value, kind):
        return value
    if isinstance(value, tuple) and len(value) == len(kind._fields):
        return kind(*value)
    given = f"tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
    raise ValueError(
        f"{op}: {name} is a {given}; expected a {kind.__name__} or a tuple of {len(kind._fields)}. Pass "
        f"pallas_kernels.{kind.__name__}({', '.join(kind._fields)})."
    )


def shown(value: Any) -> str:
    """A value in one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        return "a number of thousands of digits"  # which Python refuses to write
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def check_array(op: str, **arrays: Any) -> None:
    """Raises ValueError unless every argument is an array, of JAX or of NumPy in the byte order of this machine."""
    for name, array in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise ValueError(f"{op}: {name} is a {type(array).__name__}; expected an array. Convert it with jnp.asarray.")
        if isinstance(array, np.ndarray) and not array.dtype.isnative:
            raise ValueError(
                f"{op}: {name} has dtype {array.dtype.str}, in another byte order than this machine's; expected "
                f"{array.dtype.newbyteorder('=').str}. Convert it with {name}.astype({name}.dtype.newbyteorder('='))."
            )


def check_float(op: str, **arrays: Any) -> None:
    """Raises ValueError unless every argument is an array of a floating dtype that the ops compute with."""
    check_array(op, **arrays)
    for name, array in arrays.items():
        if array.dtype.name not in _FLOATS:
            raise ValueError(f"{op}: {name} has dtype {array.dtype}; expected one of {', '.join(_FLOATS)}. Cast it first.")


def check_vectors(op: str, **arrays: Any) -> None:
    """Raises ValueError unless every argument is an array of floats whose last axis has a channel."""
    check_float(op, **arrays)
    for name, array in arrays.items():
        if not array.ndim or not array.shape[-1]:
            raise ValueError(f"{op}: {name} has shape {list(array.shape)}; expected [..., channels], at least one.")


def check_dtype(op: str, name: str, array: Any, expected: str, wider: str | None = None) -> None:
    """Raises ValueError unless `array` has the expected dtype, or the `wider` one."""
    if array.dtype.name not in (expected, wider):
        raise ValueError(f"{op}: {name} has dtype {array.dtype}; expected {expected}. Cast with {name}.astype(jnp.{expected}).")


def check_shape(op: str, name: str, array: Any, expected: tuple[int | None, ...], meaning: str) -> None:
    """Raises ValueError unless `array` has the expected shape; None matches any size, `meaning` names the axes."""
    fits = array.ndim == len(expected) and all(
        want is None or size == want for size, want in zip(array.shape, expected, strict=True)
    )
    if not fits:
        shown = "[" + ", ".join("any" if want is None else str(want) for want in expected) + "]"
        raise ValueError(
            f"{op}: {name} has shape {list(array.shape)}; expected {shown}, which is {meaning}. "
            "Check the arguments it has to agree with."
        )


def check_index(op: str, index: IndexHeads, k_scale: Any = None, *, fp8: bool = False) -> None:
    """Checks the indexer's queries, keys and head weights against each other; `fp8`: e4m3 queries and keys will do."""
    q, k, weights = index
    check_array(op, **{"index.q": q, "index.k": k, "index.weights": weights})
    if not (fp8 and q.dtype == k.dtype == jnp.float8_e4m3fn):
        check_float(op, **{"index.q": q, "index.k": k})
    check_dtype(op, "index.weights", weights, "float32", "float64")
    check_shape(op, "index.q", q, (None,) * 4, "[B, T, index heads, index head dim]")
    batch, length, heads, dim = q.shape
    if 0 in (heads, dim):
        raise ValueError(f"{op}: index.q has shape {list(q.shape)}; expected at least one head and one channel.")
    check_shape(op, "index.k", k, (batch, None, dim), "[B, S, index head dim]")
    check_shape(op, "index.weights", weights, (batch, length, heads), "[B, T, index heads]")
    if k_scale is not None:
        check_float(op, k_scale=k_scale)
        check_shape(op, "k_scale", k_scale, (batch, k.shape[1]), "[B, S]")


def check_attention_arguments(op: str, q: Any, k: Any, v: Any = None, d_v: Any = None) -> None:
    """Checks queries, keys and values of an attention against each other."""
    check_float(op, q=q, k=k)
    check_shape(op, "q", q, (None,) * 4, "[B, T, heads, head dim]")
    batch, _, heads, dim = q.shape
    if dim == 0:
        raise ValueError(f"{op}: q has shape {list(q.shape)}; expected at least one channel.")
    check_shape(op, "k", k, (batch, None, None, dim), "[B, S, key heads, head dim]")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(
            f"{op}: q has {heads} heads and k has {k.shape[2]}; expected a multiple. "
            "Check model.attention.n_heads and model.attention.n_kv_heads in the config."
        )
    if v is not None:
        check_float(op, v=v)
        check_shape(op, "v", v, (*k.shape[:3], None), "[B, S, key heads, value dim]")
        if v.shape[-1] == 0:
            raise ValueError(f"{op}: v has shape {list(v.shape)}; expected at least one channel.")
        if d_v is not None and d_v != v.shape[-1]:
            raise ValueError(
                f"{op}: d_v is {shown(d_v)} and v has {v.shape[-1]} channels; expected the same. Leave d_v out when v is given."
            )
    elif d_v is not None and (not is_whole(d_v) or not 0 < d_v <= dim):
        raise ValueError(
            f"{op}: d_v is {shown(d_v)}; expected 1 to {dim}, since without v the values are k[..., :d_v]. Pass v or a d_v "
            "that fits."
        )


def check_sink(op: str, sink: Any, q: Any) -> None:
    """Checks the logits without a value, one for each head of the queries, or None."""
    if sink is None:
        return
    check_array(op, sink=sink)
    check_dtype(op, "sink", sink, "float32", "float64")
    check_shape(op, "sink", sink, q.shape[2:3], "[heads] of q")


def check_lse(op: str, lse: Any, q: Any) -> None:
    """Checks the log-sum-exp of an attention against its queries."""
    check_float(op, lse=lse)
    check_shape(op, "lse", lse, q.shape[:3], "[B, T, heads] of q")


def check_visible(op: str, visible: Visible, batch: int, length: int) -> None:
    """Checks the visible ranges: int32 [B, T], and start <= end where the values are known."""
    bounds = {"visible.start": visible.start, "visible.end": visible.end}
    check_array(op, **bounds)
    for name, bound in bounds.items():
        check_dtype(op, name, bound, "int32")
        check_shape(op, name, bound, (batch, length), "[B, T]")
    if all(map(_is_known, visible)):
        start, end = map(np.asarray, visible)
        if (start > end).any():
            b, t = np.argwhere(start > end)[0]
            raise ValueError(
                f"{op}: visible.start is {start[b, t]} and visible.end is {end[b, t]} at row {b}, query {t}; "
                "expected start <= end. Give start == end for a query that sees nothing."
            )


def is_whole(value: object) -> bool:
    """Whether it is an int, of Python or of NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_scale(op: str, softmax_scale: Any) -> None:
    """Raises ValueError unless it is a number, finite in float32, which a traced one cannot be: kernels are compiled for it."""
    try:
        known = not isinstance(softmax_scale, str | bool | np.bool_ | jax.core.Tracer)
        is_number = known and abs(float(softmax_scale)) <= float(np.finfo(np.float32).max)
    except (TypeError, ValueError, OverflowError):
        is_number = False
    if not is_number:
        raise ValueError(
            f"{op}: softmax_scale is {shown(softmax_scale)}; expected a finite number, known before tracing. Pass "
            "head_dim**-0.5, or multiply q by an array."
        )


def check_topk(op: str, topk: Any) -> None:
    """Raises ValueError unless `topk` is a positive int of 32 bits, as indices are."""
    if not is_whole(topk) or not 0 < topk <= INT32:
        raise ValueError(
            f"{op}: topk is {shown(topk)}; expected a positive integer below 2**31. Check model.attention.indexer.topk in the "
            "config."
        )


def check_forced(op: str, topk: int, forced: ForcedKeys) -> None:
    """Raises ValueError unless both counts are zero or more and leave room for a key that is chosen by its score."""
    if not all(map(is_whole, forced)) or min(forced) < 0 or 0 < sum(forced) >= topk:
        raise ValueError(
            f"{op}: forced.first is {shown(forced.first)} and forced.last {shown(forced.last)} with topk {topk}; expected "
            "counts of zero or more that leave at least one key to the scores. Check model.attention.indexer.forced_sink and "
            "model.attention.indexer.forced_local in the config."
        )


def check_activation(op: str, activation: Any) -> None:
    """Raises ValueError for an unknown activation of the index scores."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {shown(activation)}; expected one of {', '.join(ACTIVATIONS)}.")


def check_axis(op: str, head_axis: Any) -> None:
    """Raises ValueError unless it is None or the name of a mesh axis over which the surrounding `shard_map` maps."""
    if head_axis is None:
        return
    try:
        known = isinstance(head_axis, str) and jax.lax.axis_size(head_axis) > 0
    except NameError:
        known = False
    if not known:
        raise ValueError(
            f"{op}: head_axis is {shown(head_axis)}; expected None, or inside shard_map the name of the mesh axis that splits "
            "the heads."
        )


def check_topk_indices(op: str, topk_indices: Any, batch: int, length: int) -> None:
    """Checks a selection: int32 [B, T, K]."""
    check_array(op, topk_indices=topk_indices)
    check_dtype(op, "topk_indices", topk_indices, "int32")
    check_shape(op, "topk_indices", topk_indices, (batch, length, None), "[B, T, selected keys]")


def _is_known(array: Any) -> bool:
    return not isinstance(array, jax.core.Tracer) and (not isinstance(array, jax.Array) or array.is_fully_addressable)
