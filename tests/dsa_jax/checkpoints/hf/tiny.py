"""Tiny checkpoints of every family, written with the safetensors package; names and shapes by hand, no code of ours."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from dsa_jax.params import parameter_paths

VOCAB, HIDDEN, MLP, LAYERS, HEADS = 48, 32, 40, 3, 4
Q_RANK, KV_RANK, NOPE, ROPE, V_DIM = 20, 24, 12, 8, 10
EXPERTS, EXPERT_DIM, SHARED, DENSE_LAYERS = 4, 16, 2, 1
INDEX_HEADS, INDEX_DIM, TOPK = 2, 16, 5

YARN = {
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_BASE = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": [2, 3], "use_cache": True, "transformers_version": "5.23.0",
}  # fmt: skip
_GQA = {"num_key_value_heads": 2, "head_dim": 8}
_MLA = {
    "num_key_value_heads": HEADS, "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE, "v_head_dim": V_DIM,
}  # fmt: skip
_MOE = {
    "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_DIM, "n_shared_experts": SHARED,
    "first_k_dense_replace": DENSE_LAYERS, "moe_layer_freq": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
_INDEX = {"index_n_heads": INDEX_HEADS, "index_head_dim": INDEX_DIM, "index_topk": TOPK}
_V2 = {"norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "group_limited_greedy"}

CASES = {
    "llama": ({"model_type": "llama"} | _GQA | {"attention_bias": True}, ("llama3", LLAMA3)),
    "llama_tied": ({"model_type": "llama"} | _GQA | {"tie_word_embeddings": True}, ("default", {})),
    "qwen3": ({"model_type": "qwen3"} | _GQA | {"use_sliding_window": False, "sliding_window": 16}, ("default", {})),
    "qwen3_moe": (
        {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_DIM}
        | {"norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 1}
        | _GQA,
        ("default", {}),
    ),
    "deepseek_v2": ({"model_type": "deepseek_v2"} | _MLA | _MOE | _V2, ("yarn", YARN)),
    "deepseek_v2_lite": ({"model_type": "deepseek_v2"} | _MLA | _MOE | _V2 | {"q_lora_rank": None}, ("yarn", YARN)),
    "deepseek_v3": ({"model_type": "deepseek_v3"} | _MLA | _MOE, ("yarn", YARN)),
    "deepseek_v32": ({"model_type": "deepseek_v32"} | _MLA | _MOE | _INDEX, ("yarn", YARN)),
    "glm_moe_dsa": ({"model_type": "glm_moe_dsa"} | _MLA | _MOE | _INDEX, ("default", {})),
    "glm_moe_dsa_shared": (
        {"model_type": "glm_moe_dsa", "index_topk_freq": 2, "index_skip_topk_offset": 2} | _MLA | _MOE | _INDEX,
        ("default", {}),
    ),
    "glm4_moe_lite": ({"model_type": "glm4_moe_lite"} | _MLA | _MOE | {"rope_interleave": False}, ("default", {})),
}  # fmt: skip


def config_of(case, *, spelling="hub", dtype="float32", **changes):
    """The config.json of a case, hub style or as transformers 5 writes it; a field changed to `...` is left out."""
    fields, (kind, scaling) = CASES[case]
    content = _BASE | fields
    if spelling == "hub":
        content |= {"rope_theta": 10000.0, "rope_scaling": {"type": kind} | scaling if scaling else None, "torch_dtype": dtype}
    else:
        content |= {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | scaling, "dtype": dtype}
        if "first_k_dense_replace" in content:
            content["mlp_layer_types"] = ["dense"] * DENSE_LAYERS + ["sparse"] * (LAYERS - DENSE_LAYERS)
    content |= changes
    return {name: value for name, value in content.items() if value is not ...}


def shapes_of(content):
    """Every tensor that a checkpoint with this config.json has, by name."""
    found = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not content["tie_word_embeddings"]:
        found["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in (_attention(content, layer) | _mlp(content, layer)).items():
            found[prefix + name] = shape
        found[f"{prefix}input_layernorm.weight"] = found[f"{prefix}post_attention_layernorm.weight"] = (HIDDEN,)
    return found


def _attention(content, layer):
    if "kv_lora_rank" not in content:
        dim = content["head_dim"]
        kernels = {"q": (HEADS * dim, HIDDEN), "k": (2 * dim, HIDDEN), "v": (2 * dim, HIDDEN), "o": (HIDDEN, HEADS * dim)}
        found = {f"self_attn.{name}_proj.weight": shape for name, shape in kernels.items()}
        if content["attention_bias"]:
            found |= {f"self_attn.{name}_proj.bias": shape[:1] for name, shape in kernels.items()}
        if content["model_type"].startswith("qwen3"):
            found |= {"self_attn.q_norm.weight": (dim,), "self_attn.k_norm.weight": (dim,)}
        if "index_topk" in content:
            found |= _indexer(HIDDEN)
        return found
    q_dim = HEADS * (NOPE + ROPE)
    found = {
        "self_attn.kv_a_proj_with_mqa.weight": (KV_RANK + ROPE, HIDDEN),
        "self_attn.kv_a_layernorm.weight": (KV_RANK,),
        "self_attn.kv_b_proj.weight": (HEADS * (NOPE + V_DIM), KV_RANK),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * V_DIM),
    }
    if content["q_lora_rank"] is None:
        found["self_attn.q_proj.weight"] = (q_dim, HIDDEN)
    else:
        found["self_attn.q_a_proj.weight"] = (Q_RANK, HIDDEN)
        found["self_attn.q_a_layernorm.weight"] = (Q_RANK,)
        found["self_attn.q_b_proj.weight"] = (q_dim, Q_RANK)
    shares = "index_topk_freq" in content and layer == 2
    return found | (_indexer(Q_RANK) if "index_topk" in content and not shares else {})


def _indexer(q_dim):
    return {
        "self_attn.indexer.wq_b.weight": (INDEX_HEADS * INDEX_DIM, q_dim),
        "self_attn.indexer.wk.weight": (INDEX_DIM, HIDDEN),
        "self_attn.indexer.k_norm.weight": (INDEX_DIM,),
        "self_attn.indexer.k_norm.bias": (INDEX_DIM,),
        "self_attn.indexer.weights_proj.weight": (INDEX_HEADS, HIDDEN),
    }


def _mlp(content, layer):
    def swiglu(prefix, dim):
        return {
            f"{prefix}gate_proj.weight": (dim, HIDDEN),
            f"{prefix}up_proj.weight": (dim, HIDDEN),
            f"{prefix}down_proj.weight": (HIDDEN, dim),
        }

    if layer < DENSE_LAYERS or "num_experts_per_tok" not in content:
        return swiglu("mlp.", MLP)
    found = {"mlp.gate.weight": (EXPERTS, HIDDEN)}
    if content.get("scoring_func") == "sigmoid":
        found["mlp.gate.e_score_correction_bias"] = (EXPERTS,)
    if content.get("n_shared_experts"):
        found |= swiglu("mlp.shared_experts.", SHARED * EXPERT_DIM)
    for expert in range(EXPERTS):
        found |= swiglu(f"mlp.experts.{expert}.", EXPERT_DIM)
    return found


def tensors_of(content, seed=0):
    """Random tensors of a checkpoint; what is float32 whatever the weights are in is so here too."""
    rng = np.random.default_rng(seed)
    dtype = content.get("torch_dtype") or content.get("dtype")
    dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)

    def draw(name, shape):
        wide = name.endswith("e_score_correction_bias") or ".indexer.k_norm." in name
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        return (centre + 0.2 * rng.standard_normal(shape)).astype(np.float32 if wide else dtype)

    return {name: draw(name, shape) for name, shape in shapes_of(content).items()}


def write_checkpoint(directory, content, tensors=None, *, n_files=1):
    """Write a checkpoint directory; with several files, tensors go round them and an index names them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(content) if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(content))
    if n_files == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for number in range(n_files):
        file = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        part = dict(list(tensors.items())[number::n_files])
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def read_tensors(directory):
    """Every tensor of a checkpoint directory, by the safetensors package."""
    found = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(first, second):
    """The same parameters, bit for bit."""
    first, second = parameter_paths(first), parameter_paths(second)
    assert list(first) == list(second)
    for path, value in first.items():
        assert value.dtype == second[path].dtype, path
        np.testing.assert_array_equal(np.asarray(value), np.asarray(second[path]), err_msg=path)
