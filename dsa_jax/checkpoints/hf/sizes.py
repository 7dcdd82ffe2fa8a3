"""Numbers of a config.json against what code can take, and against the weights beside it, before anything is built of them."""

import math
import re
from pathlib import Path

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.config_fields import MOST
from dsa_jax.checkpoints.hf.weights import Weights
from dsa_jax.config.fields import flatten, to_dict
from dsa_jax.config.model import ModelConfig
from dsa_jax.foreign import printable, shown

MOST_LAYERS = 10_000
_MOST_NUMBER = 1e30
_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")
_FUSED = re.compile(r"\.experts\.(gate_up|down)_proj$")
# A size up to this costs nothing, whether or not the weights have it; `plan_sources` compares every shape.
_CHEAP = 4096
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "attention.n_heads": "num_attention_heads",
    "attention.n_kv_heads": "num_key_value_heads",
    "attention.head_dim": "head_dim",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.qk_nope_head_dim": "qk_nope_head_dim",
    "attention.qk_rope_head_dim": "qk_rope_head_dim",
    "attention.v_head_dim": "v_head_dim",
    "attention.indexer.n_heads": "index_n_heads",
    "attention.indexer.head_dim": "index_head_dim",
    "moe.n_shared_experts": "n_shared_experts",
    "moe.expert_dim": "moe_intermediate_size",
}


def check_numbers(config: ModelConfig, file: Path) -> None:
    """Require every number of a model that `file` describes to be finite and no larger than an array can be.

    Raises:
        CheckpointError: naming the field of `ModelConfig`.
    """
    for name, value in flatten(to_dict(config)).items():
        for each in value if isinstance(value, list) else [value]:
            limit = MOST if type(each) is int else _MOST_NUMBER
            if isinstance(each, int | float) and not abs(each) <= limit:
                raise CheckpointError(f"{file}: the model's {name} is {shown(each)}; expected a number of at most {limit}.")
            if name == "eos_token_ids" and type(each) is not int:
                raise CheckpointError(f"{file}: the model's {name} has {shown(each)}; expected token ids.")
    if config.n_layers > MOST_LAYERS:
        raise CheckpointError(f"{file}: the model's n_layers is {config.n_layers}; expected at most {MOST_LAYERS}.")


def check_sizes(config: ModelConfig, weights: Weights, file: Path) -> None:
    """Require the counts of layers and experts to be among the weights, and no size to be more than their largest tensor.

    Raises:
        CheckpointError: naming the field of `file`, its value and what the weights hold.
    """
    layers = {found[1] for name in weights.tensors if (found := _LAYER.match(name))}
    if config.n_layers > len(layers):
        raise CheckpointError(
            f"{file}: num_hidden_layers is {config.n_layers}, but the weights hold {len(layers)} layers; expected at most "
            "these. The checkpoint is incomplete, or config.json is that of another model."
        )
    fused = [info.shape[0] for name, info in weights.tensors.items() if info.shape and _FUSED.search(name)]
    n_experts = max([*fused, len({found[1] for name in weights.tensors if (found := _EXPERT.search(name))})])
    if config.moe.n_routed_experts > max(n_experts, 1):
        raise CheckpointError(
            f"{file}: the number of routed experts is {config.moe.n_routed_experts}, but the weights hold {n_experts}; "
            "expected at most these. The checkpoint is incomplete, or config.json is that of another model."
        )
    values = flatten(to_dict(config))
    largest = max(weights.tensors, key=lambda name: math.prod(weights.tensors[name].shape))
    limit = max(math.prod(weights.tensors[largest].shape), _CHEAP)
    for name, field in _SIZES.items():
        if values[name] > limit:
            raise CheckpointError(
                f"{file}: {field} is {values[name]}, more than the largest tensor, {printable(largest)} "
                f"{shown(list(weights.tensors[largest].shape))}, has elements. config.json is that of another model."
            )
