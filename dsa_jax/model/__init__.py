"""The transformer: attention kinds with a lightning indexer, dense or mixture-of-experts MLPs.

The names below load on first use, so that tables of the attention kinds can be read without the model.
"""

import importlib
from typing import Any

_HOME = {
    "LayerStack": "dsa_jax.model.stacks",
    "MoEStatistics": "dsa_jax.model.outputs",
    "ModelOutput": "dsa_jax.model.outputs",
    "Transformer": "dsa_jax.model.transformer",
    "abstract_params": "dsa_jax.model.build",
    "build_model": "dsa_jax.model.build",
    "init_params": "dsa_jax.model.build",
    "layer_stacks": "dsa_jax.model.stacks",
    "updated_score_bias": "dsa_jax.model.moe.router",
}

__all__ = [
    "LayerStack",
    "MoEStatistics",
    "ModelOutput",
    "Transformer",
    "abstract_params",
    "build_model",
    "init_params",
    "layer_stacks",
    "updated_score_bias",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsa_jax.model' has no attribute {name!r}.")
    return getattr(importlib.import_module(_HOME[name]), name)
