"""How wide must the indexer be?"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="indexer_dim",
        question="How wide must the indexer be?",
        axis="channels of an indexer head, half of them rotated",
        base=base(),
        variants=tuple(
            Variant(f"{n} channels", {f"{INDEXER}.head_dim": n, f"{INDEXER}.rope_dim": n // 2}, place=n) for n in (4, 8, 16, 32)
        ),
    )
