"""Hugging Face checkpoints in and out: config.json, sharded safetensors, fp8 blocks, tokenizer files.

Functions load on first use, so that catching `CheckpointError` imports no accelerator library.
"""

import importlib
from typing import Any


class CheckpointError(ValueError):
    """A Hugging Face checkpoint cannot be read or written: the message names the file, the tensor and what to do."""


_HOME = {
    "load_pretrained": "dsa_jax.checkpoints.hf.load",
    "read_model_config": "dsa_jax.checkpoints.hf.read_config",
    "save_pretrained": "dsa_jax.checkpoints.hf.save",
}

__all__ = ["CheckpointError", "load_pretrained", "read_model_config", "save_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsa_jax.checkpoints.hf' has no attribute {name!r}.")
    return getattr(importlib.import_module(_HOME[name]), name)
