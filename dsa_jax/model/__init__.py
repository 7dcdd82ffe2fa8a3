"""The transformer: MLA or GQA, with a lightning indexer, dense or mixture-of-experts MLPs."""

from dsa_jax.model.attention.selection import attention_modes
from dsa_jax.model.build import abstract_params, build_model, init_params
from dsa_jax.model.moe.router import updated_score_bias
from dsa_jax.model.outputs import ModelOutput, MoEStatistics
from dsa_jax.model.stacks import LayerStack, layer_stacks
from dsa_jax.model.transformer import Transformer

__all__ = [
    "LayerStack",
    "MoEStatistics",
    "ModelOutput",
    "Transformer",
    "abstract_params",
    "attention_modes",
    "build_model",
    "init_params",
    "layer_stacks",
    "updated_score_bias",
]
