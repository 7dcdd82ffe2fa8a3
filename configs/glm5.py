"""GLM-5: 744e9 parameters, DeepSeek Sparse Attention with wider heads and an interleaved indexer; no multi-token prediction.

`get_config("5.2")`, on the command line `--config=configs/glm5.py:5.2`, shares selections between layers as GLM-5.2 does:
layers 0, 1, 2 and every fourth from 6 to 74 have an indexer, 21 of 78.

Sources: huggingface.co/zai-org/GLM-5 `config.json`; arXiv 2602.15763; layer types of GLM-5.2 as in llama.cpp
`src/models/glm-dsa.cpp`; norm eps of the latents as in transformers (1e-6).
Command: `python -m experiments.dry_run --config=configs/glm5.py` (allocates nothing).
"""

from dsa_jax.config import AttentionConfig, Config, IndexerConfig, ModelConfig, MoEConfig, RopeConfig

N_LAYERS = 78


def get_config(arg: str = "") -> Config:
    if arg not in ("", "5.2"):
        raise ValueError(f"configs/glm5.py: the argument is {arg!r}; expected nothing or '5.2'.")
    full = [i < 3 or i % 4 == 2 for i in range(N_LAYERS)]
    layer_types = tuple("full" if own else "shared" for own in full) if arg == "5.2" else ()
    indexer = IndexerConfig(enabled=True, n_heads=32, head_dim=128, rope_dim=64, topk=2048, rope_layout="interleaved")
    attention = AttentionConfig(
        kind="mla",
        mode="sparse",
        layer_types=layer_types,
        n_heads=64,
        q_lora_rank=2048,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        rope_layout="interleaved",
        latent_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        indexer=indexer,
    )
    moe = MoEConfig(
        n_routed_experts=256,
        n_experts_per_token=8,
        n_shared_experts=1,
        expert_dim=2048,
        n_dense_layers=3,
        routed_scale=2.5,
    )
    model = ModelConfig(
        vocab_size=154880,
        hidden_dim=6144,
        n_layers=N_LAYERS,
        mlp_dim=12288,
        norm_eps=1e-5,
        tie_embeddings=False,
        embedding_initializer_range=0.02,
        max_positions=202752,
        param_dtype="bfloat16",
        dtype="bfloat16",
        remat="full",
        attention=attention,
        moe=moe,
    )
    return Config(name="glm5.2" if arg else "glm5", model=model)
