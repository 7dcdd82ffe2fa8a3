"""Can blocks of pooled index keys spare the indexer most of its scores? Untrained for it, and trained.

A query scores the means of blocks of keys, then key by key the best blocks and the first and the last one. Records are single
tokens among fillers, the hardest case for a mean: the larger the block, the less of a record is left in it.

Command:   python -m experiments.ablate --config=configs/ablations/coarse_to_fine.py
Hardware:  two CPU cores.
Result:    experiments/results/ablations/coarse_to_fine.md
"""

from configs.ablations import INDEXER, long_base
from dsa_jax.ablation.ablation import Ablation, Variant

LENGTH = 1024


def scored(block_size: int, n_blocks: int) -> float:
    """Share of the full indexer's scores that the last query computes: pooled keys, and the keys of the blocks searched."""
    return (LENGTH // block_size + block_size * (n_blocks + 2)) / LENGTH


def get_config(arg: str = "") -> Ablation:
    del arg
    recipe = long_base()
    recipe.model.attention.indexer.coarse_block_size = 16

    def coarse(block_size: int, n_blocks: int) -> dict[str, int]:
        return {f"{INDEXER}.coarse_block_size": block_size, f"{INDEXER}.coarse_blocks": n_blocks}

    def untrained(block_size: int, n_blocks: int) -> Variant:
        name = f"blocks of {block_size}, {scored(block_size, n_blocks):.0%} of the scores"
        return Variant(name, row="coarse_to_fine", at_evaluation=coarse(block_size, n_blocks))

    def trained(block_size: int, n_blocks: int, how: str, loss_weight: float) -> Variant:
        settings = {
            **coarse(block_size, n_blocks),
            f"{INDEXER}.coarse_loss_weight": loss_weight,
            "train.sparse_attention": "coarse_to_fine",
            "eval.rows": ("coarse_to_fine",),
        }
        return Variant(f"{untrained(block_size, n_blocks).name}, {how}", settings, row="coarse_to_fine")

    return Ablation(
        name="coarse_to_fine",
        question="Can pooled blocks of index keys spare the indexer most of its scores?",
        axis="scores computed for the last of 1024 keys",
        base=recipe,
        variants=(
            Variant("all scores"),
            untrained(4, 62),
            untrained(8, 46),
            untrained(8, 14),
            untrained(16, 26),
            untrained(16, 10),
            trained(16, 10, "trained on its selection", 0.0),
            trained(16, 10, "blocks learned in the warm-up", 1.0),
            trained(8, 14, "blocks learned in the warm-up", 1.0),
        ),
    )
