"""How long must the indexer warm up before attention turns sparse?

The learning rate rises over 20 steps, so that a warm-up of 15 ends at three quarters of it.
"""

from configs.ablations import base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="warmup",
        question="How long must the indexer warm up before attention turns sparse?",
        axis="warm-up steps",
        base=base(),
        variants=tuple(Variant(f"{n} steps", {"train.warmup.steps": n}, place=n) for n in (0, 15, 60, 120)),
    )
