"""Does sparse attention keep what dense attention had? The quickstart over three seeds, all rows of its table."""

from configs import quickstart
from configs.ablations import INDEXER
from dsa_jax.evals.parity import ROWS
from dsa_jax.sweeps.sweep import Ablation, Variant

SHOWN = ("dense", "sparse", "untrained", "window", "sink_window", "random", "oracle")


def get_config() -> Ablation:
    base = quickstart.get_config()
    base.eval.rows = SHOWN
    return Ablation(
        name="parity",
        question="Does sparse attention keep what dense attention had?",
        axis="the same weights under",
        base=base,
        variants=(
            *(Variant(ROWS[name].name, row=name) for name in SHOWN),
            Variant("four blocks of 4", row="blocks", at_evaluation={f"{INDEXER}.coarse_block_size": 4}),
        ),
    )
