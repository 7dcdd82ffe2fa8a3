"""Can pooled blocks of index keys spare the indexer most of its scores? Untrained for it, learned, and trained with it.

A query scores one key for each block of keys, then key by key the best blocks and the first and the last one. Records are
single tokens among fillers, the hardest case for a mean: the larger the block, the less of a record is left in it. A salient
key keeps what stands out (`pallas_kernels.pool_blocks`). "Learned" adds the loss of choosing blocks to the warm-up; "trained
with" lets the model itself, in the sparse stage, meet the selection that it is evaluated with.
"""

from configs.ablations import INDEXER, long_base
from dsa_jax.sweeps.sweep import Ablation, Variant

LENGTH = 1024


def scored(block_size: int, n_blocks: int) -> float:
    """Share of the full indexer's scores that the last query computes: pooled keys, and the keys of the blocks searched."""
    return (LENGTH // block_size + block_size * (n_blocks + 2)) / LENGTH


def coarse(pooling: str, block_size: int, n_blocks: int) -> dict[str, str | int]:
    return {
        f"{INDEXER}.coarse_pooling": pooling,
        f"{INDEXER}.coarse_block_size": block_size,
        f"{INDEXER}.coarse_blocks": n_blocks,
    }


def untrained(pooling: str, block_size: int, n_blocks: int) -> Variant:
    name = f"{pooling} of {block_size}, {scored(block_size, n_blocks):.0%} of the scores"
    return Variant(name, row="coarse_to_fine", at_evaluation=coarse(pooling, block_size, n_blocks))


def learned(pooling: str, block_size: int, n_blocks: int) -> Variant:
    settings = {
        **coarse(pooling, block_size, n_blocks),
        f"{INDEXER}.coarse_loss_weight": 3.0,
        "eval.rows": ("coarse_to_fine",),
    }
    return Variant(f"{untrained(pooling, block_size, n_blocks).name}, learned", settings, row="coarse_to_fine")


def trained_with(pooling: str, block_size: int, n_blocks: int) -> Variant:
    before = learned(pooling, block_size, n_blocks)
    settings = {**before.settings, "train.sparse_attention": "coarse_to_fine"}
    return Variant(f"{before.name} and trained with", settings, row="coarse_to_fine")


def get_config() -> Ablation:
    return Ablation(
        name="coarse_to_fine",
        question="Can pooled blocks of index keys spare the indexer most of its scores?",
        axis="scores computed for the last of 1024 keys",
        base=long_base(),
        variants=(
            Variant("all scores"),
            untrained("mean", 8, 46),
            untrained("mean", 8, 14),
            untrained("mean", 16, 10),
            untrained("salient", 8, 46),
            untrained("salient", 8, 14),
            untrained("salient", 16, 10),
            learned("mean", 8, 14),
            learned("salient", 8, 14),
            trained_with("salient", 8, 14),
        ),
    )
