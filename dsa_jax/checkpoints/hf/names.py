"""Hugging Face tensor names of our parameter paths, as data that loading and saving both read."""

from typing import NamedTuple

from dsa_jax.checkpoints.hf.fp8 import SCALE_SUFFIX
from dsa_jax.config.model import ModelConfig
from dsa_jax.model import layer_stacks
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
    "attention/wo/kernel": TensorName("self_attn.o_proj.weight", transpose=True),
    "attention/wo/bias": TensorName("self_attn.o_proj.bias"),
    "attention/indexer/wq_b/kernel": TensorName("self_attn.indexer.wq_b.weight", transpose=True),
    "attention/indexer/wk/kernel": TensorName("self_attn.indexer.wk.weight", transpose=True),
    "attention/indexer/k_norm/scale": TensorName("self_attn.indexer.k_norm.weight", float32=True),
    "attention/indexer/k_norm/bias": TensorName("self_attn.indexer.k_norm.bias", float32=True),
    "attention/indexer/weights_proj/kernel": TensorName("self_attn.indexer.weights_proj.weight", transpose=True),
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
_ATTENTION = {
    "gqa": {
        "attention/wq/kernel": TensorName("self_attn.q_proj.weight", transpose=True),
        "attention/wq/bias": TensorName("self_attn.q_proj.bias"),
        "attention/wk/kernel": TensorName("self_attn.k_proj.weight", transpose=True),
        "attention/wk/bias": TensorName("self_attn.k_proj.bias"),
        "attention/wv/kernel": TensorName("self_attn.v_proj.weight", transpose=True),
        "attention/wv/bias": TensorName("self_attn.v_proj.bias"),
        "attention/q_norm/scale": TensorName("self_attn.q_norm.weight"),
        "attention/k_norm/scale": TensorName("self_attn.k_norm.weight"),
    },
    "mla": {
        "attention/wq/kernel": TensorName("self_attn.q_proj.weight", transpose=True),
        "attention/wq_a/kernel": TensorName("self_attn.q_a_proj.weight", transpose=True),
        "attention/q_norm/scale": TensorName("self_attn.q_a_layernorm.weight"),
        "attention/wq_b/kernel": TensorName("self_attn.q_b_proj.weight", transpose=True),
        "attention/wkv_a/kernel": TensorName("self_attn.kv_a_proj_with_mqa.weight", transpose=True),
        "attention/kv_norm/scale": TensorName("self_attn.kv_a_layernorm.weight"),
        "attention/wkv_b/kernel": TensorName("self_attn.kv_b_proj.weight", transpose=True),
    },
}


def tensor_name(config: ModelConfig, path: str) -> TensorName:
    """How a checkpoint calls the parameter `path`, such as `moe_layers/attention/indexer/wq_b/kernel`."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if is_block_scales_path(path):
        kernel = tensor_name(config, path.removesuffix(BLOCK_SCALES) + "kernel")
        return TensorName(kernel.template + SCALE_SUFFIX, kernel.transpose, float32=True)
    below = path.split("/", 1)[1]
    name = _ATTENTION[config.attention.kind].get(below) or _LAYER[below]
    return name._replace(template="model.layers.{layer}." + name.template)


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
