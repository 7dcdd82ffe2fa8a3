"""Next-token cross-entropy in chunks, which never holds the logits of a whole batch."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsa_jax.data import Batch
from dsa_jax.model import ModelOutput, Transformer
from dsa_jax.model.transformer import head_logits
from dsa_jax.parallel.ambient import ROWS, axis_index, max_over, min_over, per_device, sum_over

LOGITS_PER_CHUNK = 2**24  # elements on a device; 64 MiB in float32


class TokenLoss(NamedTuple):
    """Per-position results, 0 where the mask is False: negative log-likelihood in nats, and whether argmax hit the target."""

    nll: Float[Array, "B T"]
    correct: Float[Array, "B T"]


def token_loss(
    unembed: Callable[[Float[Array, "B C E"]], Float[Array, "B C V"]],
    hidden: Float[Array, "B T E"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    vocab_size: int,
) -> TokenLoss:
    """Cross-entropy of `unembed(hidden)` against `targets`, in float32, by chunks of positions recomputed in the backward pass.

    Inside `per_device` all arguments are a device's shards: its rows, its positions, and its part of the vocabulary along
    `tensor`, over which only sums and maxima are reduced.

    Args:
        unembed: maps hidden states to logits.
        hidden: final hidden states.
        targets: token ids, ignored outside the mask.
        mask: positions that count.
        vocab_size: width of the logits, which sets the chunk length.
    """
    n_rows, length = targets.shape
    n_chunks = max(1, -(-n_rows * length * vocab_size // LOGITS_PER_CHUNK))
    chunk = -(-length // n_chunks)
    padded = chunk * n_chunks

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(n_rows, n_chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(args: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets, mask = args
        logits = unembed(hidden).astype(jnp.float32)
        safe = jnp.where(mask, targets, 0)
        # Sums and minima over the vocabulary, no gather: where it is sharded, logits are never all-gathered.
        first = axis_index("tensor") * logits.shape[-1]
        token = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        at_target = sum_over("tensor", jnp.sum(jnp.where(token == safe[..., None], logits, 0.0), axis=-1))
        largest = max_over("tensor", jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
        mass = sum_over("tensor", jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1))
        nll = largest + jnp.log(mass) - at_target
        past_all = jnp.iinfo(jnp.int32).max
        first_largest = min_over("tensor", jnp.min(jnp.where(logits == largest[..., None], token, past_all), axis=-1))
        correct = (first_largest == safe).astype(jnp.float32)
        return jnp.where(mask, nll, 0.0), jnp.where(mask, correct, 0.0)

    if n_chunks == 1:
        return TokenLoss(*one_chunk((hidden, targets, mask)))
    results = jax.lax.map(one_chunk, (split(hidden), split(targets), split(mask)))
    return TokenLoss(*(jnp.moveaxis(x, 0, 1).reshape(n_rows, padded)[:, :length] for x in results))


def forward_without_head(model: Transformer, params: dict[str, Any], batch: Batch, **request: Any) -> ModelOutput:
    """One forward pass that computes no logits; `request` goes to `Transformer.__call__`."""
    output = model.apply({"params": params}, batch.input_ids, segment_ids=batch.segment_ids, return_logits=False, **request)
    return cast(ModelOutput, output)


def forward_with_loss(
    model: Transformer, params: dict[str, Any], batch: Batch, **request: Any
) -> tuple[ModelOutput, TokenLoss]:
    """One forward pass and the cross-entropy of its batch; `request` goes to `Transformer.__call__`."""
    output = forward_without_head(model, params, batch, return_hidden=True, **request)
    kernel = params["embed"]["embedding"].T if model.tie_embeddings else params["lm_head"]["kernel"]

    def loss(hidden: jax.Array, targets: jax.Array, mask: jax.Array, kernel: jax.Array) -> TokenLoss:
        unembed = lambda x: head_logits(x, kernel, dtype=model.dtype, scale=model.logits_scale)
        return token_loss(unembed, hidden, targets, mask, vocab_size=kernel.shape[1])

    # The head is all-gathered along `fsdp`, and its gradient reduced, once and not for every chunk.
    results = TokenLoss._make([ROWS, ROWS])
    sharded = per_device(loss, in_specs=(ROWS, ROWS, ROWS, PartitionSpec(None, "tensor")), out_specs=results)
    targets, mask = jnp.asarray(batch.targets), jnp.asarray(batch.target_mask)
    return output, sharded(cast(jax.Array, output.hidden), targets, mask, kernel)
