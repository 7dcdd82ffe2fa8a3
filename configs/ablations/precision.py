"""Does the indexer need more than fp8, and does the Hadamard rotation help?"""

from typing import Any

from configs.ablations import INDEXER, base
from dsa_jax.config.model import ModelConfig
from dsa_jax.evals.outliers import with_outlier_channels
from dsa_jax.sweeps.sweep import Ablation, Variant

FP8, ROTATED = {f"{INDEXER}.fp8": True}, {f"{INDEXER}.hadamard": True}


def outliers(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """One channel of 32 eight times as large in queries and keys alike."""
    return with_outlier_channels(params, config, n_channels=1, factor=8.0, key_factor=8.0)


def get_config() -> Ablation:
    return Ablation(
        name="precision",
        question="Does the indexer need more than fp8, and does the Hadamard rotation help?",
        axis="index queries and keys",
        base=base(),
        variants=(
            Variant("float32"),
            Variant("float32, rotated", ROTATED),
            Variant("fp8", FP8),
            Variant("fp8, rotated", FP8 | ROTATED),
            Variant("outliers, float32", change_params=outliers),
            Variant("outliers, fp8", at_evaluation=FP8, change_params=outliers),
            Variant("outliers, fp8, rotated", at_evaluation=FP8 | ROTATED, change_params=outliers),
        ),
    )
