"""Does the indexer need more than fp8, and does the Hadamard rotation help?

Command:   python -m experiments.ablate --config=configs/ablations/precision.py
Hardware:  two CPU cores.
Result:    experiments/results/ablations/precision.md
"""

from configs.ablations import INDEXER, base
from dsa_jax.ablation.ablation import Ablation, Variant


def get_config(arg: str = "") -> Ablation:
    del arg
    return Ablation(
        name="precision",
        question="Does the indexer need more than fp8, and does the Hadamard rotation help?",
        axis="index queries and keys",
        base=base(),
        variants=(
            Variant("float32"),
            Variant("float32, rotated", {f"{INDEXER}.hadamard": True}),
            Variant("fp8", {f"{INDEXER}.fp8": True}),
            Variant("fp8, rotated", {f"{INDEXER}.fp8": True, f"{INDEXER}.hadamard": True}),
        ),
    )
