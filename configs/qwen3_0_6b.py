"""Qwen3-0.6B: 596,049,920 parameters with the tied embedding counted once, trained dense; a target for a retrofit.

Grouped-query attention with normed queries and keys. The indexer is ours to choose: one index key for all groups, 16 heads.

Sources: huggingface.co/Qwen/Qwen3-0.6B `config.json`; arXiv 2505.09388.
Command: `python -m experiments.dry_run --config=configs/qwen3_0_6b.py`; configs/h200x1_qwen3_0_6b.py makes it sparse.
"""

from dsa_jax.config import AttentionConfig, Config, IndexerConfig, ModelConfig, RopeConfig


def get_config() -> Config:
    attention = AttentionConfig(
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        qk_norm=True,
        rope=RopeConfig(theta=1e6),
        indexer=IndexerConfig(enabled=True, n_heads=16, head_dim=128, rope_dim=64, topk=2048),
    )
    model = ModelConfig(
        vocab_size=151936,
        hidden_dim=1024,
        n_layers=28,
        mlp_dim=3072,
        embedding_initializer_range=0.02,
        max_positions=40960,
        param_dtype="bfloat16",
        dtype="bfloat16",
        remat="full",
        attention=attention,
    )
    return Config(name="qwen3_0_6b", model=model)
