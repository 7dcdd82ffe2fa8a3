r"""Llama-3.1-8B on one GPU: the indexer's warm-up at 32K tokens, from its Hugging Face directory.

Command:   python -m experiments.retrofit --config=configs/h200x1_llama3_8b.py --config.init.hf_dir=DIR \
               --config.data.text.path=TEXT --workdir=runs/llama3_8b
           TEXT is a .txt, .jsonl or .npy file or a directory of them. The result, a dense model with a trained indexer, is
           runs/llama3_8b/hf; configs/h200x8_llama3_8b.py goes on from there with --config.init.hf_dir=runs/llama3_8b/hf
           --config.train.warmup.steps=0.
Hardware:  one H200 of 141 GB. Sparse training is not for one: float32 parameters, gradients and two moments of 8.6e9 parameters
           take 137 GB before the first activation.
Memory:    53.9 GB estimated, 53.7 by the compiler (experiments.dry_run --target=h200x1, experiments/results/dry_run.md).
Not measured: time, and the quality that comes out. Nothing here has run on a GPU yet.

131e6 tokens, four sequences per update.
"""

from configs import llama3_8b
from configs.retrofit_hf import retrofit_from_checkpoint
from dsa_jax.config import Config, StageConfig


def get_config() -> Config:
    config = llama3_8b.get_config()
    config.name = "h200x1_llama3_8b"
    config.model.param_dtype = "float32"
    retrofit_from_checkpoint(config, batch_size=4, seq_len=32768, accumulation=4)
    config.train.sparse = StageConfig(steps=0, batch_size=1, seq_len=4096)
    return config
