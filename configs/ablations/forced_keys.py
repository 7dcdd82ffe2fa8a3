"""Does it help to force the first and the last keys into the selection?"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="forced_keys",
        question="Does it help to force the first and the last keys into the selection?",
        axis="forced, of 16 keys",
        base=base(),
        variants=tuple(
            Variant(
                f"{sink} first, {local} last",
                {f"{INDEXER}.forced_sink": sink, f"{INDEXER}.forced_local": local},
            )
            for sink, local in ((0, 0), (1, 0), (0, 1), (0, 4), (1, 4), (4, 8))
        ),
    )
