"""DeepSeek-V3.2: the geometry of the released model, without its multi-token-prediction layer.

671.03e9 parameters as DeepSeek-V3, plus 61 lightning indexers of 13.96e6. The released inference code also rotates index
queries and keys by a Hadamard matrix and rounds them to fp8; transformers does neither, and neither is on here. Switch them on
with `--config.model.attention.indexer.hadamard=True --config.model.attention.indexer.fp8=True`.

Sources: deepseek-ai/DeepSeek-V3.2-Exp `inference/config_671B_v3.2.json` and `inference/model.py`; arXiv 2412.19437 and
2512.02556.
Weights are kept as they are published, in e4m3 with a scale per block, which serves and does not train; for a training step set
`--config.model.weight_format=plain`.

Command: `python -m experiments.dry_run --config=configs/deepseek_v32.py` (allocates nothing).
"""

from dsa_jax.config import AttentionConfig, Config, IndexerConfig, ModelConfig, MoEConfig, RopeConfig


def get_config() -> Config:
    rope = RopeConfig(scaling="yarn", factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
    attention = AttentionConfig(
        kind="mla",
        mode="sparse",
        n_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_layout="interleaved",
        rope=rope,
        indexer=IndexerConfig(enabled=True, n_heads=64, head_dim=128, rope_dim=64, topk=2048, rope_layout="half_split"),
    )
    moe = MoEConfig(
        n_routed_experts=256,
        n_experts_per_token=8,
        n_shared_experts=1,
        expert_dim=2048,
        n_dense_layers=3,
        n_groups=8,
        topk_groups=4,
        routed_scale=2.5,
    )
    model = ModelConfig(
        vocab_size=129280,
        hidden_dim=7168,
        n_layers=61,
        mlp_dim=18432,
        tie_embeddings=False,
        embedding_initializer_range=0.02,
        max_positions=163840,
        param_dtype="bfloat16",
        dtype="bfloat16",
        weight_format="fp8_blocks",
        remat="full",
        attention=attention,
        moe=moe,
    )
    return Config(name="deepseek_v32", model=model)
