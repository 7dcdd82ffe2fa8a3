"""A checkpoint of ours, saved once for the tests that write over it."""

import pytest

from dsa_jax import load_pretrained, save_pretrained
from tests.dsa_jax.checkpoints.hf.tiny import config_of, write_checkpoint


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of ours in `target`, and what it takes to save it again."""
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("llama")))
    save_pretrained(tmp_path / "target", loaded.config, loaded.params)
    return tmp_path / "target", loaded
