"""Can a layer use the keys that the layer before it chose?

Of two layers the second reuses the first one's selection: trained on the first layer's attention alone, or distilled from both.
"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    shared = {f"{INDEXER}.layer_types": ("full", "shared")}
    return Ablation(
        name="sharing",
        question="Can a layer use the keys that the layer before it chose?",
        axis="indexers",
        base=base(),
        variants=(
            Variant("one per layer"),
            Variant("one for both layers, of the first", shared),
            Variant("one for both layers, distilled from both", {**shared, f"{INDEXER}.distill_shared": True}),
        ),
    )
