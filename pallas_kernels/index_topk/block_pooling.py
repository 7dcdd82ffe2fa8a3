"""One index key that stands for a block of keys where blocks compete."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.common.checks import check_float, check_shape, checked, is_whole, shown

POOLINGS = ("mean", "salient")


def check_pooling(op: str, pooling: str) -> None:
    """Reject an unknown pooling.

    Raises:
        ValueError: naming it and the known ones.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"{op}: pooling is {shown(pooling)}; expected one of {', '.join(POOLINGS)}.")


def _check(k, block_size, pooling):
    check_pooling("pool_blocks", pooling)
    check_float("pool_blocks", k=k)
    check_shape("pool_blocks", "k", k, (None,) * 3, "[B, S, channels]")
    if not is_whole(block_size) or block_size < 1:
        raise ValueError(f"pool_blocks: block_size is {shown(block_size)}; expected a positive number of keys.")


@checked(_check)
def pool_blocks(k: Float[Array, "B S D"], block_size: int, pooling: str = "mean") -> Float[Array, "B N D"]:
    """One key for each complete block of `block_size` keys; the keys after the last one are left out. Differentiable.

    "mean" is their mean m. "salient" adds what remains of the keys' deviations from m when each is shrunk as by James and
    Stein, m + sum_s max(0, 1 - v / |k_s - m|^2) (k_s - m) with v the median of |k_s - m|^2 over the block: keys that stand out
    from their block, fewer than half of it, are not averaged away, and a block of like keys has its mean. Neither depends on
    another block, so what a query does not see never reaches the keys of blocks that it does see.

    Returns:
        [B, S // block_size, D], in float32 or the dtype of `k` where that is wider.

    Raises:
        ValueError: for an unknown pooling, keys that are no [B, S, D] of floats, or a block_size below 1.

    Source: HISA (arXiv 2603.28458) section 3 for the mean; "salient" is ours.
    """
    batch, length, dim = k.shape
    n_blocks = length // block_size
    blocks = k[:, : n_blocks * block_size].astype(jnp.promote_types(k.dtype, jnp.float32))
    blocks = blocks.reshape(batch, n_blocks, block_size, dim)
    mean = blocks.mean(axis=2)
    if pooling == "mean":
        return mean
    deviation = blocks - mean[:, :, None]
    squared = jnp.square(deviation).sum(axis=-1)
    # The median, which keys that stand out do not raise: with the mean, two of them would shrink each other.
    usual = jnp.median(squared, axis=-1, keepdims=True)
    # Its square, in the gradient, must not underflow.
    stands_out = squared > jnp.maximum(usual, jnp.finfo(blocks.dtype).tiny ** 0.5)
    share = jnp.where(stands_out, 1 - usual / jnp.where(stands_out, squared, 1), 0)
    return mean + (share[..., None] * deviation).sum(axis=2)
