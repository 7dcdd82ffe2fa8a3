"""DeepSeek Sparse Attention in JAX: retrofit a pretrained transformer with a lightning indexer and train it sparse.

The names below load on first use, so that importing the package for its configs costs no accelerator library.
"""

import importlib
from typing import Any

_HOME = {
    "ModelOutput": "dsa_jax.model",
    "Transformer": "dsa_jax.model",
    "build_model": "dsa_jax.model",
    "init_params": "dsa_jax.model",
    "layer_stacks": "dsa_jax.model",
}

__all__ = ["ModelOutput", "Transformer", "build_model", "init_params", "layer_stacks"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsa_jax' has no attribute {name!r}.")
    return getattr(importlib.import_module(_HOME[name]), name)
