"""A selection rule from outside the package: the first topk visible keys."""

import jax.numpy as jnp

from dsa_jax.config.selections import Selection
from dsa_jax.model.attention.selection import Rule

ROW = Selection("first", "first keys of the same budget", "the first keys of the row, as many as sparse reads")


def select_first(choice):
    start, end = choice.visible.start[..., None], choice.visible.end[..., None]
    place = start + jnp.arange(choice.topk, dtype=jnp.int32)
    return jnp.where(place < end, place, -1)


RULE = Rule(select_first)
