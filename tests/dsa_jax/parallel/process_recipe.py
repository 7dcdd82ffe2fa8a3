"""A retrofit for eight devices that a few seconds can train: `--config` of test_processes_retrofit."""

from tests.dsa_jax.train.tiny import tiny_config


def get_config(arg=""):
    config = tiny_config(steps=8)
    config.model.n_layers = 1
    config.train.pretrain.steps, config.train.warmup.steps = 0, 2
    for name in ("warmup", "sparse"):
        stage = getattr(config.train, name)
        stage.batch_size, stage.checkpoint_every = 8, 3
    config.eval.rows = ("sparse",)
    config.eval.batch_size = 8
    config.parallel.preset = "fsdp4_tp2"
    return config
