"""Can blocks of pooled index keys spare the indexer most of its scores? Untrained for it, and trained.

A query scores its 1024 keys as 64 means of 16 keys, then key by key inside the best blocks and the first and the last one.

Command:   python -m experiments.ablate --config=configs/ablations/coarse_to_fine.py
Hardware:  two CPU cores.
Result:    experiments/results/ablations/coarse_to_fine.md
"""

from configs.ablations import INDEXER, long_base
from dsa_jax.ablation.ablation import Ablation, Variant

LENGTH, BLOCK = 1024, 16


def scored(n_blocks: int) -> float:
    """Share of the full indexer's scores that the last query computes: pooled keys, and the keys of the blocks searched."""
    return (LENGTH // BLOCK + BLOCK * (n_blocks + 2)) / LENGTH


def get_config(arg: str = "") -> Ablation:
    del arg
    recipe = long_base()
    recipe.model.attention.indexer.coarse_block_size = BLOCK

    def untrained(n_blocks: int) -> Variant:
        name = f"{n_blocks + 2} of 64 blocks: {scored(n_blocks):.0%} of the scores"
        return Variant(name, row="coarse_to_fine", at_evaluation={f"{INDEXER}.coarse_blocks": n_blocks})

    def trained(n_blocks: int) -> Variant:
        coarse = {f"{INDEXER}.coarse_blocks": n_blocks, "train.sparse_attention": "coarse_to_fine"}
        settings = {**coarse, "eval.rows": ("coarse_to_fine",)}
        return Variant(f"{untrained(n_blocks).name}, trained", settings, row="coarse_to_fine")

    return Ablation(
        name="coarse_to_fine",
        question="Can pooled blocks of index keys spare the indexer most of its scores?",
        axis="scores computed for the last of 1024 keys",
        base=recipe,
        variants=(
            Variant("all scores"),
            *(untrained(n_blocks) for n_blocks in (26, 10, 6, 2)),
            trained(10),
        ),
    )
