"""Checks of what the transformer takes: token ids, with their positions and segments."""

from typing import Any

import jax.numpy as jnp


def check_inputs(input_ids: Any, positions: Any, segment_ids: Any, **_: Any) -> None:
    """Require integers of one shape [B, T]; None for positions or segments will do.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    for name, array in {"input_ids": input_ids, "positions": positions, "segment_ids": segment_ids}.items():
        if array is None:
            continue
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} has dtype {array.dtype}; expected whole numbers. Cast with {name}.astype(jnp.int32).")
        if array.ndim != 2:
            raise ValueError(f"{name} has shape {list(array.shape)}; expected [B, T]. Give a single row as {name}[None].")
        if array.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {list(array.shape)}; expected {list(input_ids.shape)}, one number for every token of "
                "input_ids."
            )
