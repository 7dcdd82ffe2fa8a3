"""How many heads does the indexer need?"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="indexer_heads",
        question="How many heads does the indexer need?",
        axis="indexer heads",
        base=base(),
        variants=tuple(Variant(f"{n} heads", {f"{INDEXER}.n_heads": n}, place=n) for n in (1, 2, 4, 8)),
    )
