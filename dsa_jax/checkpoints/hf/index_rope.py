"""Order of the indexer's rotary channels in checkpoints of families that always rotate neighbouring channels together (GLM-5).

An indexer that rotates halves (as DeepSeek-V3.2's) is written there with its rotary channels interleaved, and put back in order
when it is read: neither the norm of an index key nor the dot product of query and key depends on the order of channels.
"""

import re
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.families import FAMILIES
from dsa_jax.config.model import FP8_BLOCKS, ModelConfig
from pallas_kernels.quantize.blocks import WEIGHT_BLOCK

_ORDERED = re.compile(r".*/attention/indexer/(?:(wq_b|wk)/kernel|k_norm/(?:scale|bias))")


def is_reordered(config: ModelConfig, model_type: str, is_stored_interleaved: bool = True) -> bool:
    """Whether a checkpoint of this family stores the channels of the indexer of `config` in another order than ours."""
    family, indexer = FAMILIES.get(model_type), config.attention.indexer
    if family is None or family.indexer is None or not indexer.enabled or not is_stored_interleaved:
        return False
    return (family.indexer.rope_layout, indexer.rope_layout) == ("interleaved", "half_split")


def to_stored(config: ModelConfig, path: str, leaf: Any) -> Any:
    """A parameter of a reordered checkpoint, with its channels as they are stored.

    Raises:
        CheckpointError: for fp8 weights whose blocks hold channels that part.
    """
    order = _stored_order(config, path)
    return leaf if order is None else leaf[..., order]


def from_stored(config: ModelConfig, path: str, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """A parameter that was read from a reordered checkpoint, with its channels in our order; raises as `to_stored` does."""
    order = _stored_order(config, path)
    return value if order is None else np.take(value, np.argsort(order), axis=-1)


def _stored_order(config: ModelConfig, path: str) -> Int64[np.ndarray, " C"] | None:
    """Our channel at each place of the stored last axis of the parameter `path`; None where nothing moves."""
    match = _ORDERED.fullmatch(path)
    if match is None:
        return None
    indexer, block = config.attention.indexer, WEIGHT_BLOCK[0]
    aligned = indexer.head_dim % block == 0 or block % indexer.head_dim == 0
    if config.weight_format == FP8_BLOCKS and not (aligned and indexer.rope_dim <= block):
        raise CheckpointError(
            f"model.attention.indexer.head_dim is {indexer.head_dim}, rotated as half_split; a checkpoint of this family holds "
            f"its channels interleaved, which fp8 blocks of {block} cannot. Use weight_format plain."
        )
    order = np.arange(indexer.head_dim)
    order[: indexer.rope_dim] = order[: indexer.rope_dim].reshape(2, -1).T.reshape(-1)
    n_heads = indexer.n_heads if match[1] == "wq_b" else 1
    return (np.arange(n_heads)[:, None] * indexer.head_dim + order).reshape(-1)
