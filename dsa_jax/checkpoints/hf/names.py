"""Hugging Face tensor names of our parameter paths, as data that loading and saving both read."""

from typing import NamedTuple

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.fp8 import SCALE_SUFFIX
from dsa_jax.config.model import ModelConfig
from dsa_jax.model import layer_stacks
from dsa_jax.model.attention.indexer import INDEXER_PARAMETERS
from dsa_jax.model.attention.kinds import attention_kind
from dsa_jax.params import BLOCK_SCALES, is_block_scales_path

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class TensorName(NamedTuple):
    """Where a parameter lies in a checkpoint.

    Fields: `template` of the name with {layer} and {expert}; `transpose`: kernels are [in, out] here and [out, in] there;
    `float32`: the checkpoint holds it in float32 whatever the other weights are in.
    """

    template: str
    transpose: bool = False
    float32: bool = False


class Piece(NamedTuple):
    """One tensor of a checkpoint and the part of a parameter it fills: `place` indexes the leading layer and expert axes."""

    name: str
    place: tuple[int, ...]


_OUTSIDE = {
    "embed/embedding": TensorName(EMBEDDING),
    "final_norm/scale": TensorName("model.norm.weight"),
    "lm_head/kernel": TensorName(HEAD, transpose=True),
}
_LAYER = {
    "attention_norm/scale": TensorName("input_layernorm.weight"),
    "mlp_norm/scale": TensorName("post_attention_layernorm.weight"),
    "mlp/gate/kernel": TensorName("mlp.gate_proj.weight", transpose=True),
    "mlp/up/kernel": TensorName("mlp.up_proj.weight", transpose=True),
    "mlp/down/kernel": TensorName("mlp.down_proj.weight", transpose=True),
    "mlp/router/kernel": TensorName("mlp.gate.weight", transpose=True),
    "mlp/router/score_bias": TensorName("mlp.gate.e_score_correction_bias", float32=True),
    "mlp/experts/gate/kernel": TensorName("mlp.experts.{expert}.gate_proj.weight", transpose=True),
    "mlp/experts/up/kernel": TensorName("mlp.experts.{expert}.up_proj.weight", transpose=True),
    "mlp/experts/down/kernel": TensorName("mlp.experts.{expert}.down_proj.weight", transpose=True),
    "mlp/shared/gate/kernel": TensorName("mlp.shared_experts.gate_proj.weight", transpose=True),
    "mlp/shared/up/kernel": TensorName("mlp.shared_experts.up_proj.weight", transpose=True),
    "mlp/shared/down/kernel": TensorName("mlp.shared_experts.down_proj.weight", transpose=True),
}


def tensor_name(config: ModelConfig, path: str) -> TensorName:
    """How a checkpoint calls the parameter `path`, such as `moe_layers/attention/indexer/wq_b/kernel`."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if is_block_scales_path(path):
        kernel = tensor_name(config, path.removesuffix(BLOCK_SCALES) + "kernel")
        return TensorName(kernel.template + SCALE_SUFFIX, kernel.transpose, float32=True)
    stack, below = path.split("/", 1)
    folder, _, rest = below.partition("/")
    name = _attention_name(config, stack, rest) if folder == "attention" else _LAYER[below]
    return name._replace(template="model.layers.{layer}." + name.template)


def _attention_name(config: ModelConfig, stack: str, path: str) -> TensorName:
    kind = next(each.layer.kind for each in layer_stacks(config) if each.name == stack)
    for row in (*attention_kind(kind).parameters, *INDEXER_PARAMETERS):
        if row.path == path and row.tensor:
            return TensorName(row.tensor, transpose=path.endswith("/kernel"), float32=row.is_float32)
    raise CheckpointError(f"{stack}/attention/{path} has no name in a Hugging Face checkpoint. Keep the run directory.")


def pieces(config: ModelConfig, path: str) -> list[Piece]:
    """The tensors of the parameter `path`, layer by layer and expert by expert."""
    template = tensor_name(config, path).template
    if path in _OUTSIDE:
        return [Piece(template, ())]
    stack = next(stack for stack in layer_stacks(config) if stack.name == path.split("/", 1)[0])
    experts = range(config.moe.n_routed_experts) if "{expert}" in template else (None,)
    return [
        Piece(
            template.format(layer=stack.first_layer + i, expert=expert),
            (i,) if expert is None else (i, expert),
        )
        for i in range(stack.n_layers)
        for expert in experts
    ]
