"""The model of configs/h200_code_8k.py, extended to 32K and retrofitted there.

Command:   python -m experiments.retrofit --config=configs/h200_code_32k.py --workdir=runs/h200_code_32k
           after configs/h200_code_8k.py in runs/h200_code_8k (elsewhere: --config.init.checkpoint=DIR)
Hardware:  one H200, or two CPU cores with --config=configs/h200_code_32k.py:small after h200_code_8k.py:small.
Time:      as configs/h200_code_8k.py: not run on a GPU yet.

Starts from the dense stage there. YaRN stretches the rotary embedding four times; 13e6 tokens dense at 32K, then warm-up and
sparse training with 1024 of 32768 keys.
"""

from configs import h200_code_8k
from dsa_jax.config import Config

FACTOR = 4
LENGTH = FACTOR * h200_code_8k.LENGTH


def get_config(arg: str = "") -> Config:
    """`arg` "small" is the size for a CPU."""
    config = h200_code_8k.get_config(arg)
    length = FACTOR * config.eval.text_len
    config.init.checkpoint, config.init.stage = f"runs/{config.name}", "pretrain"
    config.name = config.name.replace("8k", "32k")
    rope = config.model.attention.rope
    rope.scaling, rope.factor, rope.original_max_positions = "yarn", float(FACTOR), length // FACTOR
    rope.mscale = rope.mscale_all_dim = 1.0
    config.model.max_positions = length
    config.model.attention.indexer.topk *= 2
    config.data.recall.tokens_per_record *= FACTOR
    config.data.recall_fraction, config.data.tasks = 0.25, (("multi_needle", 0.25),)
    for stage in (config.train.pretrain, config.train.warmup, config.train.sparse):
        stage.curriculum, stage.seq_len, stage.batch_size = (), length, 4
        stage.steps = 2 if arg else 100
    config.train.pretrain.optimizer.learning_rate, config.train.pretrain.optimizer.warmup_steps = 2e-4, 10
    config.eval.recall_len = config.eval.text_len = config.eval.task_len = length
    config.eval.batch_size = 1
    return config
