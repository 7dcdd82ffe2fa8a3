"""Can the indexer be trained from scratch, with the model?"""

from configs.ablations import base
from dsa_jax.sweeps.sweep import Ablation, Variant


def get_config() -> Ablation:
    recipe = base()
    steps = recipe.train.pretrain.steps + recipe.train.sparse.steps
    scratch = {
        "train.pretrain_attention": "sparse",
        "train.pretrain.steps": steps,
        "train.warmup.steps": 0,
        "train.sparse.steps": 0,
    }
    weight = "train.pretrain.indexer_loss_weight"
    return Ablation(
        name="scratch",
        question="Can the indexer be trained from scratch, with the model?",
        axis="16 of 256 keys",
        base=recipe,
        variants=(
            Variant("retrofit"),
            Variant("from scratch", scratch),
            Variant("from scratch, KL weight 0.1", {**scratch, weight: 0.1}),
            Variant("from scratch, no KL", {**scratch, weight: 0.0}),
        ),
    )
