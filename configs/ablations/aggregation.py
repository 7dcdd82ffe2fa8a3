"""Where does top-k fail? Tasks that need one key, a few, or many at once.

common_words and frequent_words ask which words occur most: the answer lies in more keys than a small budget can read.

Command:   python -m experiments.ablate --config=configs/ablations/aggregation.py
Hardware:  two CPU cores.
Result:    experiments/results/ablations/aggregation.md
"""

from configs.ablations import INDEXER, base
from dsa_jax.ablation.ablation import Ablation, Variant


def get_config(arg: str = "") -> Ablation:
    del arg
    recipe = base()
    recipe.data.recall_fraction = 0.5
    recipe.data.tasks = (("multi_needle", 0.25), ("common_words", 0.25))
    recipe.eval.tasks = ("multi_needle", "common_words")
    return Ablation(
        name="aggregation",
        question="Where does top-k fail: one key, a few keys, or many at once?",
        axis="topk, of 256 keys",
        base=recipe,
        variants=tuple(Variant(f"topk {n}", {f"{INDEXER}.topk": n}, place=n) for n in (4, 16, 64, 128)),
    )
