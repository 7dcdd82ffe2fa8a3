"""What does the choice of keys bring over other ways to read 16 of 256? Each trained in the third stage, as ours is."""

from configs.ablations import INDEXER, base
from dsa_jax.sweeps.sweep import Ablation, Variant

SHOWN = ("dense", "sparse", "window", "sink_window", "random", "blocks")


def get_config() -> Ablation:
    recipe = base()
    recipe.eval.rows = SHOWN

    def trained(name: str, attention: str, **settings: object) -> Variant:
        return Variant(name, {"train.sparse_attention": attention, **settings}, row=attention)

    # What does not choose by an indexer has nothing to warm up.
    no_warmup = {"train.warmup.steps": 0}
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
            Variant("indexer (ours), topk 64", {f"{INDEXER}.topk": 64}),
        ),
    )
