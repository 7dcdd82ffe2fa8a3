"""How many keys does a query need?"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="topk",
        question="How many keys does a query need?",
        axis="topk, of 256 keys",
        base=base(),
        variants=tuple(Variant(f"topk {n}", {f"{INDEXER}.topk": n}, place=n) for n in (4, 8, 16, 32, 64)),
    )
