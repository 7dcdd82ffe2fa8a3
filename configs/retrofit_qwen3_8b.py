r"""Qwen3-8B made sparse on eight GPUs of 80 GB at 32K tokens, or its indexer alone on one, from its Hugging Face directory.

Command:   python -m experiments.retrofit --config=configs/retrofit_qwen3_8b.py --config.init.hf_dir=DIR \
               --config.data.text.path=TEXT --workdir=runs/qwen3_8b
           TEXT is a .txt, .jsonl or .npy file or a directory of them. The result is runs/qwen3_8b/hf.
           configs/retrofit_qwen3_8b.py:1gpu is for one GPU; its hf continues on eight with --config.init.hf_dir=runs/...
           --config.train.warmup.tokens=0.
Hardware:  eight GPUs of 80 GB; experiments.dry_run with the same --config says the bytes, hours and dollars.
One GPU:   the warm-up fits, 100e6 tokens at 16K with the base frozen. Sparse training of the whole model does not: float32
           parameters, gradients and two moments of 8.3e9 parameters take 133 GB before the first activation;
           --config.train.sparse.tokens=N --config.train.sparse_trains=indexer goes on with the indexer alone. What comes out
           attends densely as it did, and sparsely (--attention=sparse) with a base that has not adapted: SpotAttention reports
           parity so, with another selection rule (top-p); GLM-5 lost RULER 128K 79.21 -> 71.35 after the warm-up alone.
Not measured: time, and the quality that comes out. Nothing here has run on a GPU yet.

Where the numbers come from:
  warm-up       2.1e9 tokens at 1e-3, DeepSeek-V3.2 (arXiv 2512.02556); Keye-VL-2.0 (2606.10651) took some 2e9 for a model with
                grouped queries, too. On one GPU the 100e6 at 16K of SpotAttention (2606.22874), a frozen Qwen3.
  sparse        20e9 tokens, GLM-5 (2602.15763), after whose warm-up ours is modelled; base 5e-6 and indexers 1e-4, rows of 32K
                with 2048 keys, the public conversion of Qwen3-4B (aarti-cerebras/verl).
  dense layers  the first four: in that conversion 2048 of 32K keys held 0.79 to 0.88 of their attention, 0.90 and more later.
"""

from configs import qwen3_8b
from configs.retrofit_hf import retrofit_from_checkpoint
from dsa_jax.config import Config
from dsa_jax.config.attention import FULL
from dsa_jax.config.selections import DENSE

N_DENSE = 4


def get_config(arg: str = "") -> Config:
    """`arg` "1gpu" warms the indexer up on one GPU.

    Raises:
        ValueError: for another argument.
    """
    if arg not in ("", "1gpu"):
        raise ValueError(f"the argument of this recipe is {arg!r}; expected none, or '1gpu'.")
    config = qwen3_8b.get_config()
    model, train = config.model, config.train
    config.name = f"retrofit_qwen3_8b{'_1gpu' if arg else ''}"
    model.param_dtype = "float32"
    model.attention.layer_types = (DENSE,) * N_DENSE + (FULL,) * (model.n_layers - N_DENSE)
    if arg:
        retrofit_from_checkpoint(config, batch_size=8, seq_len=16384, sparse_steps=0)
        train.warmup.steps, train.warmup.tokens = 0, 100_000_000
    else:
        config.parallel.preset = "fsdp8"
        retrofit_from_checkpoint(config, batch_size=64, seq_len=32768, sparse_steps=0)
        train.warmup.steps, train.warmup.tokens, train.sparse.tokens = 0, 2_100_000_000, 20_000_000_000
    train.sparse.optimizer.learning_rate, train.sparse.optimizer.indexer_learning_rate = 5e-6, 1e-4
    return config
