"""Must the indexer's head weights depend on the query?"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="head_weights",
        question="Must the indexer's head weights depend on the query?",
        axis="head weights",
        base=base(),
        variants=(
            Variant("learned"),
            Variant("constant", {f"{INDEXER}.head_weights": "constant"}),
        ),
    )
