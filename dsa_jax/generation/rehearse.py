"""The programs of greedy generation traced without computing: what they refuse is found before a run begins."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dsa_jax.generation.api import chunk_size, new_cache
from dsa_jax.generation.programs import Mode, Sampling, State, decode, prefill
from dsa_jax.model import Transformer
from dsa_jax.model.outputs import AttentionRequest
from dsa_jax.rehearsal import rehearse


def rehearse_generation(
    what: str, model: Transformer, params: Any, attention: str, *, n_rows: int, prompt_len: int, max_new_tokens: int
) -> None:
    """Trace prefill and decode of `generate` for prompts of these sizes.

    Args:
        what: the generation in words, for the error.
        model: the transformer.
        params: its parameters, which may be abstract.
        attention: the mode.
        n_rows: prompts.
        prompt_len: tokens of each.
        max_new_tokens: at least 1.

    Raises:
        ConfigError: as `rehearse`.
    """
    is_by_indexer = AttentionRequest(attention).by_indexer
    needs = [prompt_len + max_new_tokens - 1] * n_rows
    array: Callable[..., Any] = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    cache = jax.eval_shape(lambda: new_cache(model, needs, None, None, with_index_keys=is_by_indexer))
    state = State(cache, array(jnp.int32, n_rows), array(jnp.bool_, n_rows), array(jnp.int32))
    sampling = Sampling(array(jnp.uint32), array(jnp.float32), array(jnp.float32), array(jnp.int32, 1))
    mode = Mode(attention, samples=False, nucleus=False)
    chunk = array(jnp.int32, n_rows, chunk_size(prompt_len)), array(jnp.int32, n_rows)
    rehearse(what, functools.partial(prefill, model, mode), params, sampling, state, *chunk)
    rehearse(what, functools.partial(decode, model, mode), params, sampling, state)
