"""Choosing the next token from logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32


def row_keys(seed: UInt32[Array, ""], step: Int[Array, ""], n_rows: int) -> Key[Array, " B"]:
    """One key per row from (seed, row, step), so that the draws of a row depend on no other row."""
    by_row = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step))
    return by_row(jnp.arange(n_rows, dtype=jnp.int32))


def greedy_token(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The most probable token; ties to the lower id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample_token(
    logits: Float[Array, "B V"],
    keys: Key[Array, " B"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None,
    top_k: int = 0,
) -> Int[Array, " B"]:
    """One draw per row from softmax(logits / temperature), among the `top_k` largest, within the nucleus of these.

    Args:
        logits: float32.
        keys: one per row.
        temperature: above 0.
        top_p: probability mass of the nucleus, in (0, 1]; None for no limit.
        top_k: number of tokens, ties to the lower id; 0 for no limit.
    """
    # Greedy in the limit: neither a temperature of 0 in float32 nor an overflowing quotient may give NaN.
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    if 0 < top_k < logits.shape[-1]:
        _, largest = jax.lax.top_k(scaled, top_k)
        scaled = jnp.where(_mask(scaled.shape, largest, True), scaled, -jnp.inf)
    if top_p is not None:
        scaled = jnp.where(nucleus(jax.nn.softmax(scaled, axis=-1), top_p), scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def nucleus(probability: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """The smallest set of tokens that holds at least `top_p`: the most probable ones, ties to the lower id, never empty.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
    """
    order = jnp.argsort(-probability, axis=-1, stable=True)
    ranked = jnp.take_along_axis(probability, order, axis=-1)
    upto = jnp.cumsum(ranked, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(upto[:, :1]), upto[:, :-1]], axis=-1)
    # Always the first one, even where a tiny top_p is 0 in float32.
    kept = (before < top_p).at[:, 0].set(True)
    return _mask(probability.shape, order, kept)


def _mask(shape: tuple[int, ...], tokens: Int[Array, "B N"], values: Bool[Array, "B N"] | bool) -> Bool[Array, "B V"]:
    """False, but `values` at the `tokens` of each row."""
    return jnp.zeros(shape, bool).at[jnp.arange(shape[0])[:, None], tokens].set(values, unique_indices=True)
