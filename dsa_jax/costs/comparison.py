"""FLOPs and cache bytes of a token, dense and sparse, by the length of the sequence: the costs in reports and remarks."""

from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.costs.indexer_size import pays_from_length
from dsa_jax.costs.model import cache_bytes_per_token, forward_flops_per_token
from dsa_jax.model.attention.kinds import kinds_of

_LONGEST = 2**17


def dense_and_sparse(config: ModelConfig, length: int) -> dict[str, Any] | None:
    """Costs of a token in sequences from `length` tokens on, doubling up to 131072, by formula; None without an indexer.

    Returns:
        `lengths`; by length `dense_flops` and `sparse_flops` of a token's forward pass, on average over the sequence;
        `dense_cache_bytes` and `sparse_cache_bytes` of a token in bfloat16; `pays_from`, the least length at which
        sparse is below dense, whatever `length` is, None where there is none up to 2**20.
    """
    if not config.attention.indexer.enabled or any(kind.modes for kind in kinds_of(config)):
        return None
    lengths = [length]
    while 2 * lengths[-1] <= _LONGEST:
        lengths.append(2 * lengths[-1])
    dense, sparse = ([forward_flops_per_token(config, each, mode) for each in lengths] for mode in ("dense", "sparse"))
    return {
        "lengths": lengths,
        "dense_flops": dense,
        "sparse_flops": sparse,
        "dense_cache_bytes": cache_bytes_per_token(config, "bfloat16", "dense"),
        "sparse_cache_bytes": cache_bytes_per_token(config, "bfloat16", "sparse"),
        "pays_from": pays_from_length(config),
    }
