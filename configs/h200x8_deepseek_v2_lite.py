r"""DeepSeek-V2-Lite (16B) made sparse on eight GPUs at 128K tokens, from its Hugging Face directory.

Command:   python -m experiments.retrofit --config=configs/h200x8_deepseek_v2_lite.py --config.init.hf_dir=DIR \
               --config.data.text.path=TEXT --workdir=runs/v2_lite
           TEXT is a .txt, .jsonl or .npy file or a directory of them. The result is runs/v2_lite/hf.
           configs/h200x8_deepseek_v2_lite.py:ep8 spreads the experts instead, at 32K tokens.
Hardware:  eight H200 of 141 GB in one machine. Set XLA_PYTHON_CLIENT_MEM_FRACTION=0.97: without it JAX takes three quarters.
Memory:    per GPU, warm-up 30.2 GB estimated, 51.7 by the compiler; sparse training 131.0 and 135.1, which is tight; with ep8
           72.5 and 75.4 (experiments.dry_run --target=h200x8, experiments/results/dry_run.md).
Not measured: time, and the quality that comes out. Nothing here has run on a GPU yet.

fsdp8 gives each GPU one row and all-gathers the experts layer by layer. Expert parallelism moves the rows instead, in chunks
that fit one GPU; at 128K tokens it did not fit before it moved them in chunks, and has not been compiled since, hence 32K.
Parameters are float32 and matmuls bfloat16: at these learning rates most updates are below the spacing of bfloat16
values. 1.0e9 tokens of warm-up, 2.1e9 of sparse training.
"""

from configs import deepseek_v2_lite
from configs.retrofit_hf import retrofit_from_checkpoint
from dsa_jax.config import Config


def get_config(arg: str = "") -> Config:
    config = deepseek_v2_lite.get_config()
    config.name = "h200x8_deepseek_v2_lite"
    config.parallel.preset = arg or "fsdp8"
    config.model.param_dtype = "float32"
    length = 131072 if config.parallel.sizes()["expert"] == 1 else 32768
    return retrofit_from_checkpoint(config, batch_size=8, seq_len=length, text_sequences=16, eval_batch_size=8)
