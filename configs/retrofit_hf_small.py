"""A small Hugging Face checkpoint, such as one of 135M parameters, made sparse on a laptop.

Command:   python -m experiments.retrofit --config=configs/retrofit_hf_small.py --config.init.hf_dir=DIR --workdir=runs/small \\
               --config.data.text.path=TEXT
           TEXT is a .txt, .jsonl or .npy file or a directory of them; without it, the Python standard library's own source.
Hardware:  two CPU cores; `make real` runs it on SmolLM2-135M-Instruct. Not timed yet on a machine that did nothing else.
Result:    SmolLM2-135M on the Python library's source, one seed: text loss 2.072 dense, 2.182 sparse, 5.003 with an untrained
           indexer; needles found 0.958 dense, 0.042 sparse. So short a run keeps text and loses needles.

The indexer is small (4 heads of 32), as the model is: at 16 heads of 128 it would cost more than the attention that it saves.
Rows of 256 tokens with 32 keys are short, so that a laptop sees a difference.
"""

from configs.retrofit_hf import retrofit_from_checkpoint
from dsa_jax.config import Config, IndexerConfig, OptimizerConfig


def get_config() -> Config:
    config = Config(name="retrofit_hf_small")
    config.model.dtype = "checkpoint"
    config.model.attention.indexer = IndexerConfig(enabled=True, n_heads=4, head_dim=32, rope_dim=16, topk=32)
    sizes = {"batch_size": 2, "seq_len": 256, "accumulation": 1, "eval_batch_size": 8}
    retrofit_from_checkpoint(config, **sizes, sparse_steps=12, text_sequences=32)
    warmup, sparse = config.train.warmup, config.train.sparse
    warmup.steps, warmup.optimizer = 150, OptimizerConfig(learning_rate=3e-3, schedule="cosine", warmup_steps=5)
    sparse.optimizer = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=4, indexer_learning_rate=3e-4)
    config.data.text.max_tokens = 2_000_000
    config.eval.rows = ("dense", "sparse", "untrained", "window", "sink_window", "oracle")
    config.eval.text_tasks, config.eval.text_task_lens, config.eval.text_task_sequences = ("needle",), (256,), 24
    return config
