"""Sweeps that `experiments.ablate` runs. All start from the recipe here, so their common runs are done once."""

from configs import quickstart
from dsa_jax.config import Config

INDEXER = "model.attention.indexer"
"""Path of the settings that most sweeps change."""


def base() -> Config:
    """The quickstart with shorter stages after the same dense pretraining: 16 of 256 keys, recall and text."""
    config = quickstart.get_config()
    config.name = "base"
    config.train.warmup.steps = 120
    config.train.sparse.steps = 120
    config.eval.rows = ("dense", "sparse")
    for stage in (config.train.warmup, config.train.sparse):
        stage.log_every = 20
    return config
