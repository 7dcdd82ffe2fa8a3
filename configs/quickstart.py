"""The whole retrofit on a laptop: a small dense model learns recall and text, then gets sparse attention.

Command:   make quickstart   (python -m experiments.retrofit --config=configs/quickstart.py --workdir=runs/quickstart)
Hardware:  two CPU cores: four to five minutes with installation, 1.2 GB of memory (measured with /usr/bin/time -v).
Result:    recall of sparse attention with 16 of 256 keys within 0.02 of dense, text loss within 0.01 nats with 16 of 128
           keys (experiments/results/ablations/parity.md has three seeds).
"""

from dsa_jax.config import Config, DataConfig, OptimizerConfig, StageConfig


def get_config() -> Config:
    config = Config(name="quickstart")
    model = config.model
    model.vocab_size, model.hidden_dim, model.n_layers, model.mlp_dim = 640, 64, 2, 128
    model.initializer_range = 64**-0.5
    model.tie_embeddings, model.embedding_initializer_range, model.logits_scale = True, 1.0, 64**-0.5
    attention = model.attention
    attention.kind, attention.n_heads, attention.n_kv_heads, attention.head_dim = "gqa", 2, 2, 32
    indexer = attention.indexer
    indexer.enabled, indexer.n_heads, indexer.head_dim, indexer.rope_dim, indexer.topk = True, 4, 32, 16, 16
    config.data = DataConfig(recall_fraction=0.75)
    config.train.pretrain = StageConfig(
        steps=2400,
        batch_size=16,
        curriculum=((1700, 64), (1900, 128)),
        seq_len=256,
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
    )
    config.train.warmup = StageConfig(
        steps=150, batch_size=16, seq_len=256, optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant")
    )
    config.train.sparse = StageConfig(
        steps=150, batch_size=16, seq_len=256, optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine")
    )
    return config
