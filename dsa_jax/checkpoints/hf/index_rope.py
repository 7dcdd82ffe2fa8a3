"""The channels of an indexer in the order that a model family rotates them, where ours is another.

GLM-5's indexer always rotates neighbouring channels together, which its readers take for granted; ours may have been trained
with halves rotated together, as DeepSeek-V3.2's. An index key's norm and the product of query and key do not care for the order
of channels, so such an indexer is written with its rotated channels interleaved, and put back in order when it is read here.
"""

import re
from typing import Any

import jax
import numpy as np
from jaxtyping import Int64, Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.config.model import FP8_BLOCKS, IndexerConfig, ModelConfig
from pallas_kernels.quantize.blocks import WEIGHT_BLOCK

FAMILY = "glm_moe_dsa"
_ORDERED = re.compile(r".*/attention/indexer/(?:(wq_b|wk)/kernel|k_norm/(?:scale|bias))")


def is_reordered(config: ModelConfig, model_type: str, is_stored_interleaved: bool = True) -> bool:
    """Whether a checkpoint of this family holds the indexer of `config` in another order than ours."""
    halves = config.attention.indexer.rope_layout == "half_split"
    return model_type == FAMILY and config.attention.indexer.enabled and halves and is_stored_interleaved


def stored_order(config: ModelConfig, path: str) -> Int64[np.ndarray, " C"] | None:
    """Which of our channels stands at each place of the stored last axis of the parameter `path`; None: all where they were.

    Raises:
        CheckpointError: for fp8 weights in blocks that the order would tear apart.
    """
    match = _ORDERED.fullmatch(path)
    if match is None:
        return None
    indexer = config.attention.indexer
    _check_blocks(config, indexer)
    order = np.arange(indexer.head_dim)
    order[: indexer.rope_dim] = order[: indexer.rope_dim].reshape(2, -1).T.reshape(-1)
    n_heads = indexer.n_heads if match[1] == "wq_b" else 1
    return (np.arange(n_heads)[:, None] * indexer.head_dim + order).reshape(-1)


def to_stored(config: ModelConfig, leaves: dict[str, Any]) -> dict[str, Any]:
    """Our parameters, by path, with the indexer's in the stored order."""
    orders = {path: stored_order(config, path) for path in leaves}
    return {path: leaf if (order := orders[path]) is None else _taken(leaf, order) for path, leaf in leaves.items()}


def from_stored(config: ModelConfig, path: str, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """A parameter that was read, with its channels in our order."""
    order = stored_order(config, path)
    if order is None:
        return value
    ours = np.empty_like(value)
    ours[..., order] = value
    return ours


def _taken(leaf: Any, order: Int64[np.ndarray, " C"]) -> Any:
    return leaf[..., order] if isinstance(leaf, jax.Array) else np.ascontiguousarray(leaf[..., order])


def _check_blocks(config: ModelConfig, indexer: IndexerConfig) -> None:
    block = WEIGHT_BLOCK[0]
    aligned = indexer.head_dim % block == 0 or block % indexer.head_dim == 0
    if config.weight_format == FP8_BLOCKS and not (aligned and indexer.rope_dim <= block):
        raise CheckpointError(
            f"model.attention.indexer.head_dim is {indexer.head_dim}, rotated as half_split; a {FAMILY} checkpoint would hold "
            f"its channels interleaved, which fp8 blocks of {block} cannot. Use weight_format plain."
        )
