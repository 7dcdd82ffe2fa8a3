"""Must the indexer go on learning while the model trains sparse?"""

from configs.ablations import base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="sparse_kl",
        question="Must the indexer go on learning while the model trains sparse?",
        axis="weight of the KL in the sparse stage",
        base=base(),
        variants=tuple(
            Variant(f"weight {weight:g}", {"train.sparse.indexer_loss_weight": weight}, place=weight)
            for weight in (0.0, 0.1, 1.0)
        ),
    )
