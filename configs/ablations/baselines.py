"""What does the choice of keys bring over other ways to read 16 of 256? Each trained in the third stage, as ours is."""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant

SHOWN = ("dense", "sparse", "window", "sink_window", "random", "blocks")
# Its compressed keys alone are more than 16, so it reads more than the others: 57 keys on average.
NATIVE = {
    "compress_block": 8,
    "compress_stride": 4,
    "select_block": 8,
    "n_select_blocks": 4,
    "n_local_blocks": 1,
    "window": 8,
}


def get_config() -> Ablation:
    recipe = base()
    recipe.eval.rows = SHOWN

    def trained(name: str, attention: str, **settings: object) -> Variant:
        return Variant(name, {"train.sparse_attention": attention, **settings}, row=attention)

    # What does not choose by an indexer has nothing to warm up.
    no_warmup = {"train.warmup.steps": 0}
    native = {"model.attention.kind": "nsa"} | {f"model.attention.nsa.{name}": value for name, value in NATIVE.items()}
    alone = {"eval.rows": ("dense", "nsa"), f"{INDEXER}.enabled": False, **no_warmup}
    return Ablation(
        name="baselines",
        question="What does the choice of keys bring at equal keys read?",
        axis="trained under",
        base=recipe,
        variants=(
            Variant("indexer (ours)"),
            trained("four blocks of 4", "blocks", **{f"{INDEXER}.coarse_block_size": 4}),
            trained("sink and window", "sink_window", **no_warmup),
            trained("window", "window", **no_warmup),
            trained("random keys", "random", **no_warmup),
            trained("native sparse attention, 57 keys", "nsa", **alone, **native),
            trained(
                "native sparse attention, 57 keys, twice the steps at 3 times the rate",
                "nsa",
                **alone,
                **native,
                **{"train.sparse.steps": 240, "train.sparse.optimizer.learning_rate": 1e-3},
            ),
            Variant("indexer (ours), topk 64", {f"{INDEXER}.topk": 64}),
        ),
    )
