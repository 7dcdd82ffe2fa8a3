"""Llama-3.1-8B: 8,030,261,248 parameters, trained dense; a target for a retrofit.

Grouped-query attention with Llama's own frequency scaling. The indexer is ours to choose: one index key for all groups, 32
heads.

Sources: huggingface.co/meta-llama/Llama-3.1-8B `config.json`; arXiv 2407.21783.
Command: `python -m experiments.dry_run --config=configs/llama3_8b.py`; configs/h200x1_llama3_8b.py makes it sparse.
"""

from dsa_jax.config import AttentionConfig, Config, IndexerConfig, ModelConfig, RopeConfig


def get_config() -> Config:
    rope = RopeConfig(
        theta=5e5, scaling="llama3", factor=8.0, original_max_positions=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    attention = AttentionConfig(
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        rope=rope,
        indexer=IndexerConfig(enabled=True, n_heads=32, head_dim=128, rope_dim=64, topk=2048),
    )
    model = ModelConfig(
        vocab_size=128256,
        hidden_dim=4096,
        n_layers=32,
        mlp_dim=14336,
        norm_eps=1e-5,
        tie_embeddings=False,
        embedding_initializer_range=0.02,
        max_positions=131072,
        param_dtype="bfloat16",
        dtype="bfloat16",
        remat="full",
        attention=attention,
    )
    return Config(name="llama3_8b", model=model)
