"""Any dense Hugging Face checkpoint made sparse: warm-up of a new indexer, sparse training, parity table, Hugging Face out.

Command:   python -m experiments.retrofit --config=configs/retrofit_hf.py --config.init.hf_dir=DIR --workdir=runs/mine \\
               --config.data.text.path=TEXT
           TEXT is a .txt, .jsonl or .npy file or a directory of them; without it, the Python standard library's own source.
           The result is runs/mine/hf, the report runs/mine/report.html.
Hardware:  parameters, gradients and two moments in float32 are 16 bytes per parameter: 10 GB for 0.6e9, 128 GB for 8e9.
           For a trial on a laptop, shorten it: --config.train.warmup.steps=20 --config.train.sparse.steps=20
           --config.train.sparse.seq_len=256 and so on, with --config.model.attention.indexer.topk=64.

The stages follow DeepSeek-V3.2-Exp (report, section 2.1: 1000 warm-up steps at 1e-3, then 7.3e-6) at a size for one GPU; GLM-5
(arXiv 2602.15763) shows that 1000 warm-up steps and some 20e9 tokens of sparse training are enough for a strong model. The
indexer has the shape of V3.2's with a quarter of its heads.
"""

from dsa_jax.config import Config, DataConfig, EvalConfig, IndexerConfig, OptimizerConfig, StageConfig


def get_config() -> Config:
    config = Config(name="retrofit_hf")
    config.model.remat = "full"
    config.model.attention.indexer = IndexerConfig(enabled=True, n_heads=16, head_dim=128, rope_dim=64, topk=2048)
    config.data = DataConfig(recall_fraction=0.0)
    config.data.text.tokenizer = "checkpoint"
    config.train.warmup = StageConfig(
        steps=1000,
        batch_size=8,
        seq_len=8192,
        accumulation=8,
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
        checkpoint_every=250,
    )
    config.train.sparse = StageConfig(
        steps=2000,
        batch_size=8,
        seq_len=8192,
        accumulation=8,
        optimizer=OptimizerConfig(learning_rate=7.3e-6, schedule="constant", warmup_steps=100),
        checkpoint_every=250,
    )
    config.eval = EvalConfig(recall_sequences=0, text_len=8192, text_sequences=64, batch_size=1)
    return config
