"""DeepSeek Sparse Attention in JAX: retrofit a pretrained transformer with a lightning indexer and train it sparse.

The names below load on first use, so that importing the package for its configs costs no accelerator library.
"""

import importlib
from typing import Any

_HOME = {
    "Pretrained": "dsa_jax.checkpoints.pretrained",
    "GenerateOutput": "dsa_jax.generation",
    "ModelOutput": "dsa_jax.model",
    "Transformer": "dsa_jax.model",
    "build_model": "dsa_jax.model",
    "generate": "dsa_jax.generation",
    "init_params": "dsa_jax.model",
    "layer_stacks": "dsa_jax.model",
    "load_pretrained": "dsa_jax.checkpoints.hf",
    "save_pretrained": "dsa_jax.checkpoints.hf",
}

__version__ = "0.1.0"

__all__ = [
    "GenerateOutput",
    "ModelOutput",
    "Pretrained",
    "Transformer",
    "build_model",
    "generate",
    "init_params",
    "layer_stacks",
    "load_pretrained",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsa_jax' has no attribute {name!r}.")
    return getattr(importlib.import_module(_HOME[name]), name)
