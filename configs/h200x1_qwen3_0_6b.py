r"""Qwen3-0.6B made sparse on one GPU, from its Hugging Face directory.

Command:   python -m experiments.retrofit --config=configs/h200x1_qwen3_0_6b.py --config.init.hf_dir=DIR \
               --config.data.text.path=TEXT --workdir=runs/qwen3_0_6b
           TEXT is a .txt, .jsonl or .npy file or a directory of them. The result is runs/qwen3_0_6b/hf.
Hardware:  one H200 of 141 GB.
Memory:    warm-up 8.9 GB estimated, 11.2 by the compiler; sparse training 42.5 and 38.7 (experiments.dry_run --target=h200x1,
           experiments/results/dry_run.md).
Not measured: time, and the quality that comes out. Nothing here has run on a GPU yet.

Parameters are float32 and matmuls bfloat16: at these learning rates most updates are below the spacing of bfloat16
values. 262e6 tokens of warm-up, 524e6 of sparse training; the stages follow configs/retrofit_hf.py.
"""

from configs import qwen3_0_6b
from configs.retrofit_hf import retrofit_from_checkpoint
from dsa_jax.config import Config


def get_config() -> Config:
    config = qwen3_0_6b.get_config()
    config.name = "h200x1_qwen3_0_6b"
    config.model.param_dtype = "float32"
    return retrofit_from_checkpoint(config, batch_size=8, seq_len=32768, accumulation=4)
