"""A small Hugging Face checkpoint, such as one of 135M parameters, made sparse on a laptop.

Command:   python -m experiments.retrofit --config=configs/retrofit_hf_small.py --config.init.hf_dir=DIR --workdir=runs/small \\
               --config.data.text.path=TEXT
           TEXT is a .txt, .jsonl or .npy file or a directory of them; without it, the Python standard library's own source.
Hardware:  two CPU cores; `make real` runs it on SmolLM2-135M-Instruct in 23 minutes, 148 tokens/s in the warm-up and 43 in
           the sparse stage on two AVX2 cores of an AMD EPYC.
Result:    README's first table: text loss 1.941 sparse, 1.891 dense; needles 0.250 and 1.000. One seed.

The indexer is small (8 heads of 64), as the model is: SmolLM2-135M saves FLOPs with it from 1275 tokens on with 64 keys, and at
no length with the 16 heads of 128 of larger models. Rows of 512 tokens with 64 keys are short, so that a laptop sees a
difference.
"""

from configs.retrofit_hf import retrofit_from_checkpoint
from dsa_jax.config import Config, IndexerConfig, OptimizerConfig


def get_config() -> Config:
    config = Config(name="retrofit_hf_small")
    config.model.dtype = "checkpoint"
    config.model.attention.indexer = IndexerConfig(enabled=True, n_heads=8, head_dim=64, rope_dim=32, topk=64)
    retrofit_from_checkpoint(
        config, batch_size=1, seq_len=512, accumulation=1, sparse_steps=8, text_sequences=12, eval_batch_size=4
    )
    warmup, sparse = config.train.warmup, config.train.sparse
    warmup.steps, warmup.optimizer = 150, OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=5)
    sparse.optimizer = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=4, indexer_learning_rate=1e-3)
    config.data.text.max_tokens = 2_000_000
    config.eval.loop_sequences = 8
    config.eval.text_tasks, config.eval.text_task_lens, config.eval.text_task_sequences = ("needle",), (512,), 12
    return config
