"""A retrofit for eight devices that a few seconds can train: `--config` of test_processes_retrofit.

Half of the rows are text that is read as it goes, from the files given after the colon.
"""

from tests.dsa_jax.train.tiny import tiny_config


def get_config(arg=""):
    config = tiny_config(steps=8)
    config.model.n_layers = 1
    config.train.pretrain.steps, config.train.warmup.steps = 0, 2
    for name in ("warmup", "sparse"):
        stage = getattr(config.train, name)
        stage.batch_size, stage.checkpoint_every = 8, 3
    config.data.recall_fraction = 0.5
    config.data.text.path, config.data.text.source, config.data.text.held_out_fraction = arg, "grain", 0.2
    config.eval.rows = ("sparse",)
    config.eval.batch_size = 8
    config.parallel.preset = "fsdp4_tp2"
    return config
