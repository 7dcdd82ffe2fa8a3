"""DeepSeek-V2-Lite: 15,706,484,224 parameters, trained dense; a target for a retrofit on one machine.

MLA without a query latent (the indexer reads the normed hidden state), softmax router without groups or bias. The indexer is
ours to choose, as the released model has none: a quarter of the heads of DeepSeek-V3.2's, the same width and topk.

Sources: huggingface.co/deepseek-ai/DeepSeek-V2-Lite `config.json`; arXiv 2405.04434.
Command: `python -m experiments.dry_run --config=configs/deepseek_v2_lite.py`;
configs/h200x8_deepseek_v2_lite.py makes it sparse.
"""

from dsa_jax.config import AttentionConfig, Config, IndexerConfig, ModelConfig, MoEConfig, RopeConfig


def get_config() -> Config:
    rope = RopeConfig(scaling="yarn", factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707)
    attention = AttentionConfig(
        kind="mla",
        n_heads=16,
        q_lora_rank=0,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_layout="interleaved",
        rope=rope,
        indexer=IndexerConfig(enabled=True, n_heads=16, head_dim=128, rope_dim=64, topk=2048),
    )
    moe = MoEConfig(
        n_routed_experts=64,
        n_experts_per_token=6,
        n_shared_experts=2,
        expert_dim=1408,
        n_dense_layers=1,
        scoring="softmax",
        group_score="max",
        normalize_weights=False,
        use_score_bias=False,
        balance_loss_weight=0.001,
    )
    model = ModelConfig(
        vocab_size=102400,
        hidden_dim=2048,
        n_layers=27,
        mlp_dim=10944,
        tie_embeddings=False,
        embedding_initializer_range=0.02,
        max_positions=163840,
        param_dtype="bfloat16",
        dtype="bfloat16",
        remat="full",
        attention=attention,
        moe=moe,
    )
    return Config(name="deepseek_v2_lite", model=model)
