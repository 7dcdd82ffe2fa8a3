"""A retrofit for eight devices that a few seconds can train: `--config` of test_processes."""

from tests.dsa_jax.train.tiny import tiny_config


def get_config(arg=""):
    config = tiny_config("mla", moe=True, steps=8)
    config.model.n_layers, config.model.moe.n_dense_layers = 1, 0
    config.train.pretrain.steps, config.train.warmup.steps = 0, 2
    for name in ("warmup", "sparse"):
        stage = getattr(config.train, name)
        stage.batch_size, stage.checkpoint_every = 8, 3
    config.eval.rows = ("sparse",)
    config.parallel.preset = "fsdp2_ep2_tp2"
    return config
