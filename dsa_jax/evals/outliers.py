"""Indexers with outlier channels, on which quantisation with and without the Hadamard rotation can be compared.

The error of q . k in e4m3, and when the rotation helps, follow from e4m3's errors being relative. Channel by channel they
add up to about eps * sqrt(sum_j q_j^2 k_j^2); rotated, every channel carries an equal share of both norms and the sum becomes
eps * |q| |k| / sqrt(D). So the rotation helps against outliers that queries and keys have in the same channels, does nothing
for channels that are all alike, and harms where one side is large in just the channels in which the other is small.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.params import nested_parameters, parameter_paths


def with_outlier_channels(
    params: dict[str, Any], config: ModelConfig, *, n_channels: int, factor: float, key_factor: float | None = None
) -> dict[str, Any]:
    """The parameters with the first `n_channels` unrotated channels of every index query scaled, and those of the index keys.

    The queries' factor goes into the columns of wq_b, that of the keys into scale and bias of their norm.

    Args:
        params: of `config`; other parameters than the indexers' are passed on.
        factor: of the queries' channels, positive; a power of two loses no bits.
        key_factor: of the keys', positive; None is 1 / factor, which leaves every score as it is up to rounding. e4m3 hardly
            notices that before 1e5, where the other channels underflow; with the Hadamard rotation it loses precision. Given
            `factor` once more, queries and keys have their outliers in the same channels, whose errors dominate a score until
            the rotation spreads them. That changes the scores, so do it before the indexer is trained.

    Raises:
        ConfigError: when the model has no indexer, or not as many channels that are not rotated.
        ValueError: for a factor that is not positive.
    """
    indexer = config.attention.indexer
    key_factor = 1 / factor if key_factor is None and factor > 0 else key_factor
    if key_factor is None or factor <= 0 or key_factor <= 0:
        raise ValueError(f"factor is {factor} and key_factor {key_factor}; expected positive numbers.")
    unrotated = indexer.head_dim - indexer.rope_dim
    if not indexer.enabled or not 1 <= n_channels <= unrotated:
        raise ConfigError(
            f"n_channels is {n_channels}; expected 1 to the {unrotated} channels of an index head that are not rotated, in a "
            "model with model.attention.indexer.enabled=True. Take fewer channels, or an indexer with a smaller rope_dim."
        )
    chosen = np.zeros(indexer.head_dim, bool)
    chosen[indexer.rope_dim : indexer.rope_dim + n_channels] = True
    of_queries, of_keys = (np.where(chosen, x, 1.0).astype(np.float32) for x in (factor, key_factor))
    scales = {
        "/indexer/wq_b/kernel": np.tile(of_queries, indexer.n_heads),
        "/indexer/k_norm/scale": of_keys,
        "/indexer/k_norm/bias": of_keys,
    }
    flat = parameter_paths(params)
    for path, leaf in flat.items():
        for end, scale in scales.items():
            if path.endswith(end):
                flat[path] = (jnp.asarray(leaf) * scale).astype(leaf.dtype)
    return nested_parameters(flat)
