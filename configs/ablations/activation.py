"""What does the ReLU of the indexer do?"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="activation",
        question="What does the ReLU of the indexer do?",
        axis="activation of the index scores",
        base=base(),
        variants=(
            Variant("ReLU"),
            Variant("none", {f"{INDEXER}.activation": "none"}),
            Variant("softmax over keys", {f"{INDEXER}.activation": "softmax"}),
        ),
    )
