r"""Qwen3-0.6B made sparse on one GPU, from its Hugging Face directory.

Command:   python -m experiments.retrofit --config=configs/h200x1_qwen3_0_6b.py --config.init.hf_dir=DIR \
               --config.data.text.path=TEXT --workdir=runs/qwen3_0_6b
           TEXT is a .txt, .jsonl or .npy file or a directory of them. The result is runs/qwen3_0_6b/hf.
Hardware:  one H200 of 141 GB.
Memory:    warm-up 8.9 GB estimated, 11.2 by the compiler; sparse training 42.5 and 38.7 (experiments.dry_run --target=h200x1,
           experiments/results/dry_run.md).
Not measured: time, and the quality that comes out. Nothing here has run on a GPU yet.

Parameters are float32 and products bfloat16: at these learning rates most updates are smaller than the steps between two
bfloat16 numbers. 262e6 tokens of warm-up, 524e6 of sparse training; the stages follow configs/retrofit_hf.py.
"""

from configs import qwen3_0_6b
from dsa_jax.config import Config, DataConfig, EvalConfig, OptimizerConfig, StageConfig


def get_config() -> Config:
    config = qwen3_0_6b.get_config()
    config.name = "h200x1_qwen3_0_6b"
    config.model.param_dtype = "float32"
    config.data = DataConfig(recall_fraction=0.0)
    config.data.text.tokenizer = "checkpoint"
    config.train.warmup = StageConfig(
        steps=1000,
        batch_size=8,
        seq_len=32768,
        accumulation=4,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        checkpoint_every=250,
    )
    config.train.sparse = StageConfig(
        steps=2000,
        batch_size=8,
        seq_len=32768,
        accumulation=4,
        optimizer=OptimizerConfig(learning_rate=7.3e-6, schedule="constant", warmup_steps=100),
        checkpoint_every=250,
    )
    config.eval = EvalConfig(recall_sequences=0, text_len=32768, text_sequences=32, batch_size=1)
    return config
