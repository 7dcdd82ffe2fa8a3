"""Named shapes of the benchmarked ops: one that a laptop finishes in seconds, and the real ones of the GPU kernels."""

from typing import Any

from dsa_jax.costs.ops import OpShape

OPS = (
    "index_scores",
    "index_topk",
    "sparse_attention",
    "sparse_attention_backward",
    "decode",
    "decode_fp8",
    "dense_attention",
    "indexer_kl_selected",
    "indexer_kl_visible",
)

_INDEXER: dict[str, Any] = {"index_heads": 64, "index_dim": 128}
# DeepSeek-V3.2 and Llama-3-8B.
_LATENT = OpShape(4096, 32768, 2048, heads=128, groups=1, dim=576, d_v=512, **_INDEXER)
_GROUPED = OpShape(4096, 32768, 2048, heads=32, groups=8, dim=128, value_dim=128, **_INDEXER)
_POOL = _LATENT._replace(keys=8 * 32768)
_EXPANDED = _LATENT._replace(groups=128, dim=192, value_dim=128, d_v=None)
_LAPTOP = OpShape(512, 2048, 256, heads=8, dim=160, d_v=128, index_heads=8, index_dim=32, dtype="float32")
PREFILL = {
    "128_heads": _LATENT,
    "64_heads": _LATENT._replace(heads=64),
    "16_heads": _LATENT._replace(heads=16),
    "8_heads": _LATENT._replace(heads=8),
    "32_heads_8_groups": _GROUPED,
    "32_heads_8_groups_of_64": _GROUPED._replace(dim=64, value_dim=64),
}
_INDEX = {
    "prefill_32k": _LATENT,
    "prefill_32k_fp8": _LATENT._replace(dtype="float8_e4m3fn"),
    "prefill_128k": _LATENT._replace(keys=131072),
    "decode_32k": _LATENT._replace(batch=32, queries=1),
    "decode_128k": _LATENT._replace(batch=32, queries=1, keys=131072),
    "decode_128k_fp8": _LATENT._replace(batch=32, queries=1, keys=131072, dtype="float8_e4m3fn"),
}
_DECODE = {f"batch_{queries}": _POOL._replace(queries=queries) for queries in (1, 8, 32, 128)}

# By op, then name; "laptop" is the default on CPU, all others together on a GPU.
SHAPES: dict[str, dict[str, OpShape]] = {
    "index_scores": _INDEX,
    "index_topk": _INDEX,
    "sparse_attention": {
        **PREFILL,
        "128_heads_local": _LATENT._replace(selection="local"),
        "128_heads_128k": _LATENT._replace(keys=131072),
    },
    "sparse_attention_backward": PREFILL,
    "decode": {**_DECODE, "batch_32_8_groups": _GROUPED._replace(queries=32, keys=_POOL.keys)},
    "decode_fp8": _DECODE,
    # Of latent attention: expanded per head in prefill, absorbed in decode.
    "dense_attention": {
        "prefill_32k": _EXPANDED,
        "prefill_128k": _EXPANDED._replace(keys=131072),
        "decode_32k": _LATENT._replace(batch=32, queries=1),
        "decode_128k": _LATENT._replace(batch=32, queries=1, keys=131072),
    },
    "indexer_kl_selected": {name: PREFILL[name] for name in ("128_heads", "64_heads", "32_heads_8_groups")},
    "indexer_kl_visible": {name: PREFILL[name] for name in ("128_heads", "64_heads", "32_heads_8_groups")},
}
SHAPES = {op: {"laptop": _LAPTOP, **shapes} for op, shapes in SHAPES.items()}
SHAPES["decode"]["laptop"] = _LAPTOP._replace(queries=4)
SHAPES["decode_fp8"]["laptop"] = _LAPTOP._replace(queries=4)

# For kernels that are interpreted: nothing measured at it says anything about a device.
INTERPRETED = OpShape(3, 40, 12, heads=2, dim=48, d_v=32, index_heads=2, index_dim=16, dtype="float32")
