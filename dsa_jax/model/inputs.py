"""Checks of what the transformer takes: token ids, with their positions and segments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_inputs(input_ids: Any, positions: Any, segment_ids: Any, **_: Any) -> None:
    """Require integers of one shape [B, T]; None for positions or segments will do.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    for name, array in {"input_ids": input_ids, "positions": positions, "segment_ids": segment_ids}.items():
        if array is None:
            continue
        if not hasattr(array, "dtype"):
            raise ValueError(f"{name} is a {type(array).__name__}; expected an array. Make it one with jnp.asarray({name}).")
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}; expected whole numbers. Cast with {name}.astype(jnp.int32).")
        if isinstance(array, np.ndarray) and not array.dtype.isnative:
            raise ValueError(
                f"{name} has dtype {array.dtype.str}, in another byte order than this machine's. Cast with "
                f"{name}.astype(np.int32)."
            )
        if isinstance(array, np.ndarray) and array.size and not (array.min() >= -(2**31) and array.max() < 2**31):
            far = array.min() if array.min() < -(2**31) else array.max()
            raise ValueError(f"{name} holds {far}; expected numbers that fit 32 bits, as JAX keeps them. Renumber them.")
        if array.ndim != 2:
            raise ValueError(f"{name} has shape {list(array.shape)}; expected [B, T]. Give a single row as {name}[None].")
        if array.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(array.shape)}; expected {list(input_ids.shape)}, one number for every token of "
                "input_ids."
            )


def at_least_32_bits(array: Any) -> jax.Array:
    """Integers as JAX holds them, none so narrow that a position, or what marks an id outside the vocabulary, does not fit."""
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.int32))


def check_new_tokens(input_ids: Any, n_new: Any, *, n_rows: int) -> None:
    """Require token ids [n_rows, T] and, for each row, how many of them are new, from 0 to T where that is known.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    check_inputs(input_ids, None, None)
    if input_ids.shape[0] != n_rows:
        raise ValueError(f"input_ids has {input_ids.shape[0]} rows; expected {n_rows}, as many as the cache.")
    if np.shape(n_new) != (n_rows,):
        raise ValueError(f"n_new has shape {list(np.shape(n_new))}; expected [{n_rows}], one number for every row.")
    if not isinstance(n_new, jax.core.Tracer):
        counts = np.asarray(n_new)
        if counts.size and (counts.min() < 0 or counts.max() > input_ids.shape[1]):
            raise ValueError(
                f"n_new is {counts.tolist()}; expected numbers from 0 to {input_ids.shape[1]}, the length of input_ids."
            )
