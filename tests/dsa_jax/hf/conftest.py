"""These tests spend their time compiling, so they compile without optimisation."""

import pytest

from dsa_jax import load_pretrained, save_pretrained
from tests.dsa_jax.hf.tiny import config_of, write_checkpoint
from tests.dsa_jax.model.conftest import compile_quickly

__all__ = ["compile_quickly"]


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of ours in `target`, and what it takes to save it again."""
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("llama")))
    save_pretrained(tmp_path / "target", loaded.config, loaded.params)
    return tmp_path / "target", loaded
