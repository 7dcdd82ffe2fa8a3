"""Hugging Face checkpoints in and out: config.json, sharded safetensors, fp8 blocks, tokenizer files.

Names load on first use, so that catching `CheckpointError` or describing a family imports no accelerator library.
"""

import importlib
from typing import Any

from dsa_jax.foreign import printable

_MOST_SAID = 1200


class CheckpointError(ValueError):
    """A Hugging Face checkpoint cannot be read or written: the message names the file, the tensor and what to do.

    Names in it may be those of a foreign file, so the message is made `printable`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, _MOST_SAID))


_HOME = {
    "Family": "families",
    "FamilyIndexer": "families",
    "Router": "families",
    "load_pretrained": "load",
    "read_model_config": "read_config",
    "register_family": "families",
    "registered_family": "families",
    "save_pretrained": "save",
}

__all__ = [
    "CheckpointError",
    "Family",
    "FamilyIndexer",
    "Router",
    "load_pretrained",
    "read_model_config",
    "register_family",
    "registered_family",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsa_jax.checkpoints.hf' has no attribute {name!r}.")
    return getattr(importlib.import_module(f"dsa_jax.checkpoints.hf.{_HOME[name]}"), name)
