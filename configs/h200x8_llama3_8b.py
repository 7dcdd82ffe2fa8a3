r"""Llama-3.1-8B made sparse on eight GPUs at 32K tokens, from its Hugging Face directory; parameters and rows split eight ways.

Command:   python -m experiments.retrofit --config=configs/h200x8_llama3_8b.py --config.init.hf_dir=DIR \
               --config.data.text.path=TEXT --workdir=runs/llama3_8b
           TEXT is a .txt, .jsonl or .npy file or a directory of them. The result is runs/llama3_8b/hf.
Hardware:  eight H200 of 141 GB in one machine.
Memory:    per GPU, warm-up 17.1 GB estimated, 18.2 by the compiler; sparse training 53.5 and 49.6 (experiments.dry_run
           --target=h200x8, experiments/results/dry_run.md).
Not measured: time, and the quality that comes out. Nothing here has run on a GPU yet.

Parameters are float32 and matmuls bfloat16: at these learning rates most updates are below the spacing of bfloat16
values. 0.5e9 tokens of warm-up, 2.1e9 of sparse training.
"""

from configs import llama3_8b
from configs.retrofit_hf import retrofit_from_checkpoint
from dsa_jax.config import Config


def get_config() -> Config:
    config = llama3_8b.get_config()
    config.name = "h200x8_llama3_8b"
    config.parallel.preset = "fsdp8"
    config.model.param_dtype = "float32"
    sizes = {"batch_size": 16, "seq_len": 32768, "accumulation": 2, "sparse_steps": 4000}
    return retrofit_from_checkpoint(config, **sizes, text_sequences=64, eval_batch_size=8)
