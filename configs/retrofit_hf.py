"""Any dense Hugging Face checkpoint made sparse: warm-up of a new indexer, sparse training, parity table, Hugging Face out.

Command:   python -m experiments.retrofit --config=configs/retrofit_hf.py --config.init.hf_dir=DIR --workdir=runs/mine \\
               --config.data.text.path=TEXT
           TEXT is a .txt, .jsonl or .npy file or a directory of them; without it, the Python standard library's own source.
           The result is runs/mine/hf, the report runs/mine/report.html. On eight GPUs add --config.parallel.preset=fsdp8.
Before:    python -m experiments.dry_run --config=configs/retrofit_hf.py --config.init.hf_dir=DIR_WITH_CONFIG_JSON
           says from config.json alone whether it fits, how long it takes, what it costs and where sparse attention pays.
Hardware:  parameters, gradients and two moments in float32 are 16 bytes per parameter: 10 GB for 0.6e9, 128 GB for 8e9.
           For a trial on a laptop, shorten it: --config.train.warmup.steps=20 --config.train.sparse.steps=20
           --config.train.sparse.seq_len=256 and so on, with --config.model.attention.indexer.topk=64.

The stages follow DeepSeek-V3.2-Exp (report, section 2.1: 1000 warm-up steps at 1e-3, then 7.3e-6) at a size for one GPU; GLM-5
(arXiv 2602.15763) shows that 1000 warm-up steps and some 20e9 tokens of sparse training are enough for a strong model. What
the checkpoint and the devices decide is left to them: the dtype of matmuls is the checkpoint's (on a CPU float32), index heads
have the shape of V3.2's and are as many as sparse attention pays for at train.sparse.seq_len
(`dsa_jax.costs.indexer_size.paying_heads`), and each device computes one row at a time.
"""

from dsa_jax.config import Config, DataConfig, EvalConfig, IndexerConfig, OptimizerConfig, StageConfig


def get_config() -> Config:
    config = Config(name="retrofit_hf")
    config.model.dtype, config.model.remat = "checkpoint", "full"
    config.model.attention.indexer = IndexerConfig(enabled=True, n_heads=0, head_dim=128, rope_dim=64, topk=2048)
    return retrofit_from_checkpoint(config, batch_size=8, seq_len=8192, text_sequences=64)


def retrofit_from_checkpoint(
    config: Config,
    *,
    batch_size: int,
    seq_len: int,
    accumulation: int = 0,
    sparse_steps: int = 2000,
    text_sequences: int = 32,
    eval_batch_size: int = 0,
) -> Config:
    """Set data, stages and evaluation of `config` to text under the checkpoint's tokenizer and the steps described above."""
    config.data = DataConfig(recall_fraction=0.0)
    config.data.text.tokenizer = "checkpoint"
    constant = OptimizerConfig(learning_rate=1e-3, schedule="constant")
    slow = OptimizerConfig(learning_rate=7.3e-6, schedule="constant", warmup_steps=100)
    config.train.warmup, config.train.sparse = (
        StageConfig(
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            accumulation=accumulation,
            optimizer=optimizer,
            checkpoint_every=250,
        )
        for steps, optimizer in ((1000, constant), (sparse_steps, slow))
    )
    config.train.gate = "warn"
    config.eval = EvalConfig(recall_sequences=0, text_len=seq_len, text_sequences=text_sequences, batch_size=eval_batch_size)
    return config
