r"""Llama-3.1-8B made sparse on eight GPUs at 32K tokens, from its Hugging Face directory; parameters and rows split eight ways.

Command:   python -m experiments.retrofit --config=configs/h200x8_llama3_8b.py --config.init.hf_dir=DIR \
               --config.data.text.path=TEXT --workdir=runs/llama3_8b
           TEXT is a .txt, .jsonl or .npy file or a directory of them. The result is runs/llama3_8b/hf.
Hardware:  eight H200 of 141 GB in one machine.
Memory:    per GPU, warm-up 17.1 GB estimated, 18.2 by the compiler; sparse training 53.5 and 49.6 (experiments.dry_run
           --target=h200x8, experiments/results/dry_run.md).
Not measured: time, and the quality that comes out. Nothing here has run on a GPU yet.

Parameters are float32 and products bfloat16: at these learning rates most updates are smaller than the steps between two
bfloat16 numbers. 0.5e9 tokens of warm-up, 2.1e9 of sparse training.
"""

from configs import llama3_8b
from dsa_jax.config import Config, DataConfig, EvalConfig, OptimizerConfig, StageConfig


def get_config() -> Config:
    config = llama3_8b.get_config()
    config.name = "h200x8_llama3_8b"
    config.parallel.preset = "fsdp8"
    config.model.param_dtype = "float32"
    config.data = DataConfig(recall_fraction=0.0)
    config.data.text.tokenizer = "checkpoint"
    config.train.warmup = StageConfig(
        steps=1000,
        batch_size=16,
        seq_len=32768,
        accumulation=2,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        checkpoint_every=250,
    )
    config.train.sparse = StageConfig(
        steps=4000,
        batch_size=16,
        seq_len=32768,
        accumulation=2,
        optimizer=OptimizerConfig(learning_rate=7.3e-6, schedule="constant", warmup_steps=100),
        checkpoint_every=250,
    )
    config.eval = EvalConfig(recall_sequences=0, text_len=32768, text_sequences=64, batch_size=8)
    return config
