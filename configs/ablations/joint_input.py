"""Should the indexer's loss reach the model through its input?"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    return Ablation(
        name="joint_input",
        question="Should the indexer's loss reach the model through its input?",
        axis="input of the indexer",
        base=base(),
        variants=(
            Variant("detached"),
            Variant("joint", {f"{INDEXER}.detach_input": False}),
        ),
    )
