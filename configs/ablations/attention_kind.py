"""Does the retrofit work as well on latent attention as on grouped-query attention?"""

from configs.ablations import base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    attention = "model.attention"
    latent = {
        f"{attention}.kind": "mla",
        f"{attention}.kv_lora_rank": 48,
        f"{attention}.qk_nope_head_dim": 16,
        f"{attention}.qk_rope_head_dim": 16,
        f"{attention}.v_head_dim": 32,
    }
    return Ablation(
        name="attention_kind",
        question="Does the retrofit work on latent attention as on grouped-query attention?",
        axis="attention",
        base=base(),
        variants=(
            Variant("heads of their own (MHA)"),
            Variant("two query heads on one key head (GQA)", {f"{attention}.n_kv_heads": 1}),
            Variant("latent (MLA)", latent),
        ),
    )
