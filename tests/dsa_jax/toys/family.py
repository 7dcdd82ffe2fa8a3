"""A model family from outside the package: as a llama, with biases of q, k and v that no field mentions."""

from dsa_jax.checkpoints.hf.families import Family

TOY = Family(
    architecture="ToyForCausalLM",
    attention="gqa",
    head_dim="stated",
    qk_norm=False,
    biases="qkv",
    windows="none",
    rope_layout="half_split",
    rotated="all",
    extras=(),
    router=None,
    indexer=None,
    mtp_layers=False,
    defaults={"hidden_act": "silu", "rms_norm_eps": 3e-3, "initializer_range": 0.01, "tie_word_embeddings": False},
)
