"""The two compiled programs of generation: append a chunk of prompt, and append the last token; both sample the next one.

Each is compiled once per model, mode and set of shapes, ahead of its first use, so that compilation is timed apart and never
happens between two tokens.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsa_jax.generation.sampling import greedy_token, row_keys, sample_token
from dsa_jax.model import Transformer
from dsa_jax.model.attention.cache import Cache

HEADS_NDIM = 4
"""Axes of a pool of heads: layers, slots, heads, channels."""
KEPT_PROGRAMS = 32
"""Compiled programs kept for later calls with the same shapes."""


@dataclass(frozen=True)
class Mode:
    """Static options of the programs: attention, sampling or greedy, nucleus or not, most tokens to draw from (0: all)."""

    attention: str
    samples: bool
    nucleus: bool
    top_k: int = 0


class State(NamedTuple):
    """State between steps; donated.

    Fields: `cache` without the last token; `tokens` last of each row; `live` rows that had not ended before their last token;
    `step` number of new tokens of each live row.
    """

    cache: Cache
    tokens: Int[Array, " B"]
    live: Bool[Array, " B"]
    step: Int[Array, ""]


class Sampling(NamedTuple):
    """Sampling parameters that need no new compilation."""

    seed: UInt32[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stop_tokens: Int[Array, " N"]


def state_shardings(state: State, mesh: Mesh) -> State:
    """Shardings of the state on `mesh`: keys and values are sharded by head over the axis "tensor".

    Latents and index keys, which all heads read, are replicated, as are heads whose number `tensor` does not divide.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    n_parts = mesh.shape.get("tensor", 1)
    by_head = NamedSharding(mesh, PartitionSpec(None, None, "tensor")) if n_parts > 1 else everywhere
    splits = lambda pool: pool.ndim == HEADS_NDIM and pool.shape[2] % n_parts == 0
    pools = jax.tree.map(lambda pool: by_head if splits(pool) else everywhere, state.cache.pools)
    shardings = jax.tree.map(lambda _: everywhere, state)
    return shardings._replace(cache=shardings.cache._replace(pools=pools))


def prefill(
    model: Transformer,
    mode: Mode,
    params: dict[str, Any],
    sampling: Sampling,
    state: State,
    input_ids: Int[Array, "B T"],
    n_new: Int[Array, " B"],
) -> State:
    """Append `n_new` of the tokens of each row, a chunk of its prompt, and sample the one that follows."""
    result: Any = model.apply({"params": params}, input_ids, n_new, state.cache, attention=mode.attention, method="extend")
    if mode.samples:
        keys = row_keys(sampling.seed, state.step, len(n_new))
        top_p = sampling.top_p if mode.nucleus else None
        following = sample_token(result.logits, keys, sampling.temperature, top_p, mode.top_k)
    else:
        following = greedy_token(result.logits)
    return state._replace(cache=result.cache, tokens=jnp.where(n_new > 0, following, state.tokens))


def decode(model: Transformer, mode: Mode, params: dict[str, Any], sampling: Sampling, state: State) -> State:
    """Append the last token of each row that has not ended, and sample the next."""
    live = state.live & ~jnp.isin(state.tokens, sampling.stop_tokens)
    state = state._replace(live=live, step=state.step + 1)
    return prefill(model, mode, params, sampling, state, state.tokens[:, None], live.astype(jnp.int32))


def compiled(
    program: Callable[..., State], model: Transformer, mode: Mode, *arguments: Any
) -> tuple[Callable[..., State], float]:
    """(`program` compiled for the shapes and shardings of `arguments`, seconds of compilation in this call).

    The `State` among the arguments is donated; the new one has its shardings.
    """
    leaves, structure = jax.tree.flatten(arguments)
    abstract = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves)
    begin = time.perf_counter()
    # The current mesh decides how a program is partitioned, so it is part of the key.
    executable = _compile(program, model, mode, structure, abstract, jax.sharding.get_abstract_mesh())
    return executable, time.perf_counter() - begin


@functools.lru_cache(maxsize=KEPT_PROGRAMS)
def _compile(
    program: Callable[..., State],
    model: Transformer,
    mode: Mode,
    structure: Any,
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    mesh: jax.sharding.AbstractMesh,
) -> Callable[..., State]:
    del mesh  # part of the key
    arguments = jax.tree.unflatten(structure, leaves)
    place = [i for i, argument in enumerate(arguments) if isinstance(argument, State)]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments[place[0]])
    # A function of its own per program: `jax.jit` identifies functions by identity.
    step = functools.partial(program, model, mode)
    return jax.jit(step, donate_argnums=tuple(place), out_shardings=shardings).lower(*arguments).compile()
