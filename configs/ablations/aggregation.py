"""Where does top-k fail? A task that needs many keys at once, where recall (see topk.py) needs one.

common_words asks which words of the row occur most: the answer lies in more keys than a small budget can read. The model learns
nothing else here, because in a mixture a model of this size does not learn to count.
"""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    recipe = base()
    recipe.data.recall_fraction, recipe.data.tasks = 0.0, (("common_words", 1.0),)
    recipe.train.pretrain.steps, recipe.train.pretrain.curriculum = 1800, ((1200, 64),)
    for stage in (recipe.train.pretrain, recipe.train.warmup, recipe.train.sparse):
        stage.seq_len = 128
    recipe.eval.tasks, recipe.eval.task_len, recipe.eval.task_sequences = ("common_words",), 128, 256
    return Ablation(
        name="aggregation",
        question="Where does top-k fail: counting words, which needs many keys at once",
        axis="topk, of 128 keys",
        base=recipe,
        variants=tuple(Variant(f"topk {n}", {f"{INDEXER}.topk": n}, place=n) for n in (4, 8, 16, 32, 64)),
    )
