"""Sweeps, one question each; their runs start from the recipes here, so that shared runs are done once.

Command:   python -m experiments.ablate --config=configs/ablations/NAME.py
Hardware:  two CPU cores.
Result:    experiments/results/ablations/NAME.md
"""

from configs import quickstart
from dsa_jax.config import Config

INDEXER = "model.attention.indexer"
"""Dotted path of the settings that most sweeps change."""


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


def long_base() -> Config:
    """The longest rows that train in minutes on two CPU cores: 32 of 1024 keys; recall, needles and text."""
    config = base()
    config.name = "long_base"
    config.data.recall_fraction, config.data.tasks = 0.5, (("multi_needle", 0.25),)
    config.data.recall.tokens_per_record = 32
    indexer = config.model.attention.indexer
    # Wider than in the quickstart: where blocks compete, one key speaks for several.
    indexer.topk, indexer.n_heads, indexer.head_dim, indexer.rope_dim = 32, 8, 64, 32
    config.train.pretrain.steps = 2900
    config.train.pretrain.curriculum = ((1900, 64), (2200, 128), (2500, 256), (2700, 512))
    config.train.pretrain.seq_len = 1024
    for stage, steps in ((config.train.warmup, 300), (config.train.sparse, 100)):
        stage.steps, stage.seq_len, stage.batch_size = steps, 1024, 8
    config.eval.recall_len = config.eval.text_len = config.eval.task_len = 1024
    config.eval.tasks = ("multi_needle",)
    config.eval.recall_sequences = config.eval.text_sequences = config.eval.task_sequences = 64
    config.eval.batch_size = 8
    return config
