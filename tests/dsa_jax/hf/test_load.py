"""What loading gives: the config in both spellings, every tensor in its place, and errors that say what is wrong."""

import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax import load_pretrained
from dsa_jax.config import IndexerConfig
from dsa_jax.hf import CheckpointError, read_model_config
from dsa_jax.model import build_model, init_params
from dsa_jax.params import is_indexer_path, parameter_paths
from tests.dsa_jax.hf.tiny import CASES, EXPERTS, HIDDEN, LAYERS, VOCAB, config_of, shapes_of, tensors_of, write_checkpoint

INDEXER = IndexerConfig(enabled=True, n_heads=2, head_dim=16, rope_dim=8, topk=5)


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_describe_the_same_model(case, tmp_path):
    contents = [config_of(case, spelling=spelling) for spelling in ("hub", "transformers 5")]
    first, second = (read_model_config(write_checkpoint(tmp_path / str(i), c)) for i, c in enumerate(contents))
    assert first == second
    assert first.family == contents[0]["model_type"]
    assert first.eos_token_ids == (2, 3)
    assert first.bos_token_id == 1


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_used_and_lies_where_it_belongs(case, tmp_path):
    content = config_of(case)
    tensors = tensors_of(content)
    params = parameter_paths(load_pretrained(write_checkpoint(tmp_path, content, tensors, n_files=3)).params)
    # Transposing and stacking move numbers about but change none of them.
    there = np.sort(np.concatenate([value.ravel() for value in tensors.values()]))
    here = np.sort(np.concatenate([np.asarray(value).ravel() for value in params.values()]))
    np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(params["embed/embedding"], tensors["model.embed_tokens.weight"])
    first = "dense_layers" if any(path.startswith("dense_layers/") for path in params) else "moe_layers"
    np.testing.assert_array_equal(
        params[f"{first}/attention/wo/kernel"][0], tensors["model.layers.0.self_attn.o_proj.weight"].T
    )
    if "num_experts_per_tok" in content:
        stack = next(path.split("/")[0] for path in params if path.startswith("moe_layers"))
        down = params[f"{stack}/mlp/experts/down/kernel"]
        np.testing.assert_array_equal(down[0, 2], tensors["model.layers.1.mlp.experts.2.down_proj.weight"].T)
        np.testing.assert_array_equal(params[f"{stack}/mlp/router/kernel"][0], tensors["model.layers.1.mlp.gate.weight"].T)


def test_latent_attention_and_indexer_by_name(tmp_path):
    content = config_of("deepseek_v32")
    tensors = tensors_of(content)
    params = parameter_paths(load_pretrained(write_checkpoint(tmp_path, content, tensors)).params)
    for ours, theirs in {
        "attention/wq_b/kernel": "self_attn.q_b_proj.weight",
        "attention/wkv_a/kernel": "self_attn.kv_a_proj_with_mqa.weight",
        "attention/wkv_b/kernel": "self_attn.kv_b_proj.weight",
        "attention/q_norm/scale": "self_attn.q_a_layernorm.weight",
        "attention/kv_norm/scale": "self_attn.kv_a_layernorm.weight",
        "attention/indexer/wq_b/kernel": "self_attn.indexer.wq_b.weight",
        "attention/indexer/wk/kernel": "self_attn.indexer.wk.weight",
        "attention/indexer/k_norm/scale": "self_attn.indexer.k_norm.weight",
        "attention/indexer/k_norm/bias": "self_attn.indexer.k_norm.bias",
        "attention/indexer/weights_proj/kernel": "self_attn.indexer.weights_proj.weight",
        "attention_norm/scale": "input_layernorm.weight",
        "mlp_norm/scale": "post_attention_layernorm.weight",
        "mlp/router/score_bias": "mlp.gate.e_score_correction_bias",
        "mlp/shared/up/kernel": "mlp.shared_experts.up_proj.weight",
    }.items():
        np.testing.assert_array_equal(params[f"moe_layers/{ours}"][1], tensors[f"model.layers.2.{theirs}"].T, err_msg=ours)


def test_fused_experts_are_read_too(tmp_path):
    content = config_of("qwen3_moe")
    tensors = tensors_of(content)
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        each = [[tensors[f"{prefix}.{i}.{p}_proj.weight"] for i in range(EXPERTS)] for p in ("gate", "up", "down")]
        fused[f"{prefix}.gate_up_proj"] = np.concatenate([np.stack(each[0]), np.stack(each[1])], axis=1)
        fused[f"{prefix}.down_proj"] = np.stack(each[2])
    plain = load_pretrained(write_checkpoint(tmp_path / "plain", content, tensors)).params
    same = load_pretrained(write_checkpoint(tmp_path / "fused", content, fused)).params
    jax.tree.map(np.testing.assert_array_equal, plain, same)


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_types(stored, asked, expected, tmp_path):
    content = config_of("deepseek_v3", dtype=stored)
    tensors = tensors_of(content)
    loaded = load_pretrained(write_checkpoint(tmp_path, content, tensors), dtype=asked)
    params = parameter_paths(loaded.params)
    assert loaded.config.param_dtype == loaded.config.dtype == expected
    assert params["embed/embedding"].dtype == expected
    assert params["moe_layers/attention/wo/kernel"].dtype == expected
    for path in ("moe_layers/mlp/router/kernel", "moe_layers/attention/kv_norm/scale", "moe_layers/mlp/router/score_bias"):
        assert params[path].dtype == "float32"
    value = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed/embedding"], value.astype(params["embed/embedding"].dtype))


def test_a_dtype_that_config_json_leaves_out_is_that_of_the_embedding(tmp_path):
    stored = config_of("llama", dtype="bfloat16")
    tensors = tensors_of(stored)
    unstated = {name: value for name, value in stored.items() if name != "torch_dtype"}
    assert load_pretrained(write_checkpoint(tmp_path, unstated, tensors)).config.param_dtype == "bfloat16"


def test_parameters_go_where_they_are_told(tmp_path):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    directory = write_checkpoint(tmp_path, config_of("llama"))
    replicated = load_pretrained(directory, mesh=mesh).params
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(replicated))
    asked = []

    def placement(path):
        asked.append(path)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    placed = load_pretrained(directory, placement=placement).params
    assert sorted(asked) == sorted(parameter_paths(placed))


def test_a_dense_checkpoint_gets_the_indexer_that_a_seed_draws(tmp_path, caplog):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    with caplog.at_level(logging.INFO):
        loaded = load_pretrained(directory, indexer=INDEXER, seed=7)
    assert loaded.config.attention.mode == "dense"
    fresh = parameter_paths(init_params(build_model(loaded.config), jax.random.key(7)))
    plain = parameter_paths(load_pretrained(directory).params)
    added = [path for path in parameter_paths(loaded.params) if path not in plain]
    assert added
    assert all(is_indexer_path(path) and path in caplog.text for path in added)
    for path, value in parameter_paths(loaded.params).items():
        np.testing.assert_array_equal(value, fresh[path] if path in added else plain[path], err_msg=path)


def test_an_indexer_with_sharing_layers_can_be_added_and_used(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    shared = IndexerConfig(n_heads=2, head_dim=16, rope_dim=8, topk=5, layer_types=("full", "shared", "full"))
    loaded = load_pretrained(directory, indexer=shared, attention="sparse")
    assert loaded.config.attention.indexer.enabled
    assert loaded.config.attention.mode == "sparse"
    assert len(loaded.model.stacks) == 3


def test_an_indexer_that_is_there_already_must_be_the_one_asked_for(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("deepseek_v32"))
    theirs = read_model_config(directory).attention.indexer
    assert load_pretrained(directory, indexer=theirs).config.attention.mode == "sparse"
    with pytest.raises(CheckpointError, match="has indexers of its own"):
        load_pretrained(directory, indexer=IndexerConfig(enabled=True))


def test_multi_token_prediction_layers_are_skipped_by_index_and_counted(tmp_path, caplog):
    content = config_of("deepseek_v3", num_nextn_predict_layers=1)
    extra = {f"model.layers.{LAYERS}.{name}.weight": np.ones((2, 2), np.float32) for name in ("eh_proj", "self_attn.o_proj")}
    with caplog.at_level(logging.INFO):
        load_pretrained(write_checkpoint(tmp_path / "one", content, tensors_of(content) | extra))
    assert "skipped 2 tensors of 1 multi-token-prediction layers" in caplog.text
    beyond = {f"model.layers.{LAYERS + 1}.eh_proj.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(CheckpointError, match=rf"model\.layers\.{LAYERS + 1}\.eh_proj"):
        load_pretrained(write_checkpoint(tmp_path / "two", content, tensors_of(content) | extra | beyond))


def test_what_carries_no_weights_is_passed_over(tmp_path, caplog):
    content = config_of("llama_tied", _name_or_path="somewhere", pad_token_id=0, invented_field=3)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": np.zeros((VOCAB, HIDDEN), np.float32),
    }
    with caplog.at_level(logging.INFO):
        loaded = load_pretrained(write_checkpoint(tmp_path, content, tensors_of(content) | extra))
    assert "lm_head" not in loaded.params
    assert "its own copy lm_head.weight is not read" in caplog.text
    assert "not known: invented_field" in caplog.text


def test_generation_config_decides_what_ends_a_text(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert read_model_config(directory).eos_token_ids == (5, 6)


@pytest.mark.parametrize(
    ("fields", "layer_types"),
    [
        ({"index_topk_freq": 2, "index_skip_topk_offset": 2}, ("full", "full", "shared")),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 1}, ("full", "shared", "shared")),
        ({"index_topk_pattern": "FSF"}, ("full", "shared", "full")),
        ({"index_topk_pattern": ["full", "full", "shared"]}, ("full", "full", "shared")),
        ({"indexer_types": ["full", "shared", "shared"], "index_topk_freq": 1}, ("full", "shared", "shared")),
        ({}, ()),
    ],
)
def test_which_layers_share(fields, layer_types, tmp_path):
    config = read_model_config(write_checkpoint(tmp_path, config_of("glm_moe_dsa", **fields)))
    assert config.attention.indexer.layer_types == layer_types
    assert config.attention.indexer.rope_layout == "interleaved"


def test_the_index_rotation_is_the_one_the_config_names(tmp_path):
    config = read_model_config(write_checkpoint(tmp_path, config_of("glm_moe_dsa", indexer_rope_interleave=False)))
    assert config.attention.indexer.rope_layout == "half_split"


@pytest.mark.parametrize(
    ("scaling", "magnitude"),
    [
        ({"attention_factor": 1.3}, 1.3),
        ({}, 0.1 * np.log(4.0) + 1),
        ({"mscale": 3.0}, 0.1 * np.log(4.0) + 1),
        ({"mscale_all_dim": 1.0}, 0.1 * np.log(4.0) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 1.0}, (0.2 * np.log(4.0) + 1) / (0.1 * np.log(4.0) + 1)),
    ],
)
def test_yarn_magnitude(scaling, magnitude, tmp_path):
    from dsa_jax.model.rope import rope_from_config, rotary_magnitude

    content = config_of("deepseek_v3", rope_scaling={"rope_type": "yarn", "factor": 4.0} | scaling)
    rope = read_model_config(write_checkpoint(tmp_path, content)).attention.rope
    assert rotary_magnitude(rope_from_config(rope, dim=8, layout="interleaved")) == pytest.approx(magnitude, rel=1e-12)
    assert rope.original_max_positions == 64


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected silu"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"sliding_window": 16}, "sliding_window is 16; expected null"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "rope_scaling.truncate is False"),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section is [1]"),
        ("llama", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"]}, "layer_types is ['full_attention'"),
        ("llama", {"torch_dtype": "float64"}, "torch_dtype is 'float64'; expected one of float32, bfloat16, float16"),
        ("llama", {"num_hidden_layers": "three"}, "num_hidden_layers is 'three'; expected a whole number"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            "quantization_config.weight_block_size is None",
        ),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "sliding_window is 16; expected null"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; expected 1"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers is [1]"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ("deepseek_v3", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types is ['sparse', 'dense'"),
        ("deepseek_v3", {"n_routed_experts": 0}, "n_routed_experts is 0"),
        ("deepseek_v3", {"n_routed_experts": 4, "num_experts": 8}, "disagree"),
        ("deepseek_v32", {"rope_interleave": False}, "rope_interleave is False"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank is None; expected a positive rank"),
        ("deepseek_v32", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "expected mscale equal to mscale_all_dim"),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared"]}, "indexer_types is ['full', 'shared']"),
        ("glm_moe_dsa", {"index_topk_pattern": "FX"}, "index_topk_pattern is 'FX'"),
        ("glm_moe_dsa", {"indexer_types": ["shared", "full", "full"]}, "the first layer has no earlier one"),
        ("glm4_moe_lite", {"head_dim": 16}, "head_dim is 16; expected qk_rope_head_dim (8)"),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(case, changes, message, tmp_path):
    directory = write_checkpoint(tmp_path, config_of(case, **changes), {})
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_model_config(directory)
    assert message in str(caught.value)


def test_a_sliding_window_that_no_layer_uses_is_no_obstacle(tmp_path):
    content = config_of("qwen3", use_sliding_window=True, max_window_layers=LAYERS)
    assert read_model_config(write_checkpoint(tmp_path, content, {})).n_layers == LAYERS


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_fields_that_are_needed_are_named(missing, tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama", **{missing: ...}), {})
    with pytest.raises(CheckpointError, match=f"lacks {missing}"):
        read_model_config(directory)


def test_an_unknown_family_gets_the_list_of_known_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_type is 'gpt9'.*deepseek_v32.*qwen3_moe"):
        load_pretrained(write_checkpoint(tmp_path, config_of("llama", model_type="gpt9")))


def test_missing_places(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"holds a list; expected a JSON object"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_pretrained(tmp_path)


def test_missing_extra_and_misshaped_tensors_are_named_with_both_shapes(tmp_path):
    content = config_of("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = tensors_of(content)
    del tensors[name]
    with pytest.raises(CheckpointError, match=rf"lacks {name} \[40, 32\]"):
        load_pretrained(write_checkpoint(tmp_path / "missing", content, tensors))
    tensors[name] = np.zeros((32, 40), np.float32)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors holds {name} with shape \[32, 40\], expected \[40, 32\]"):
        load_pretrained(write_checkpoint(tmp_path / "misshaped", content, tensors))
    tensors = tensors_of(content) | {"model.layers.0.mlp.extra.weight": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.extra\.weight \[3\], which the model .* no use for"):
        load_pretrained(write_checkpoint(tmp_path / "extra", content, tensors))
    tensors = tensors_of(content) | {name: np.zeros((40, 32), np.int8)}
    with pytest.raises(CheckpointError, match=rf"{name} is of type I8"):
        load_pretrained(write_checkpoint(tmp_path / "integers", content, tensors))


def test_nothing_is_made_up_for_an_indexer_that_the_config_declares(tmp_path):
    content = config_of("deepseek_v32")
    tensors = {name: value for name, value in tensors_of(content).items() if ".indexer." not in name}
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\..*indexer"):
        load_pretrained(write_checkpoint(tmp_path, content, tensors))


def test_damaged_weight_files(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = "model.norm.weight"

    def damaged(content, match):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(directory)

    def with_header(changed):
        encoded = json.dumps(changed).encode()
        return len(encoded).to_bytes(8, "little") + encoded + whole[8 + length :]

    damaged(whole[:-1], r"is cut off: .* ends at byte")
    damaged(whole[: length // 2], "is cut off or no safetensors file")
    damaged(b"", "is cut off or no safetensors file")
    damaged(b"\xff" * 100, "is cut off or no safetensors file")
    damaged(whole[:8] + b"#" * length + whole[8 + length :], "header that is not JSON")
    damaged(with_header([1]), "no JSON object")
    damaged(with_header(header | {name: header[name] | {"shape": [31]}}), rf"{name} takes 128 bytes; expected 124")
    damaged(with_header(header | {name: header[name] | {"dtype": "F4"}}), rf"{name} has dtype F4")
    damaged(with_header(header | {name: {"dtype": "F32"}}), rf"header entry of {name}")


def test_damaged_index_files(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"), n_files=2)
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.norm.weight"

    def damaged(weight_map, match):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(directory)

    for outside in ("../secret.safetensors", "/etc/passwd", "sub/model.safetensors", ".."):
        damaged(content["weight_map"] | {name: outside}, "expected a file in that directory")
    damaged(content["weight_map"] | {name: "model-00009.safetensors"}, r"names model-00009\.safetensors for model\.norm")
    damaged(content["weight_map"] | {"invented.weight": "model-00001-of-00002.safetensors"}, r"does not hold invented\.weight")
    damaged({each: file for each, file in content["weight_map"].items() if each != name}, rf"holds {name}, which .* not list")
    damaged([], "has no weight_map")


def quantized(tensors, names, block=(128, 128)):
    """e4m3 weights with the scale of each block's largest value, and what they stand for, element by element."""
    stored, meaning = dict(tensors), {}
    for name in names:
        value = tensors[name]
        rows, columns = (-(-size // step) for size, step in zip(value.shape, block, strict=True))
        scales = np.empty((rows, columns), np.float32)
        q = np.empty(value.shape, ml_dtypes.float8_e4m3fn)
        for i in range(rows):
            for j in range(columns):
                place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
                scales[i, j] = np.abs(value[place]).max() / 448.0
                q[place] = (value[place] / scales[i, j]).astype(ml_dtypes.float8_e4m3fn)
        stored |= {name: q, f"{name}_scale_inv": scales}
        meaning[name] = np.array(
            [
                [np.float32(q[i, j]) * scales[i // block[0], j // block[1]] for j in range(value.shape[1])]
                for i in range(value.shape[0])
            ]
        )
    return stored, meaning


FP8_SIZES = {"vocab_size": 8, "hidden_size": 192, "intermediate_size": 160, "num_hidden_layers": 1, "head_dim": 576 // 4}


def fp8_checkpoint(directory, block, stated, **changes):
    """A llama whose up_proj is 160 x 192 and whose q_proj is 576 x 192: both have partial blocks."""
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": stated}
    content = config_of("llama_tied", dtype="bfloat16") | FP8_SIZES | {"quantization_config": quantization}
    rng = np.random.default_rng(3)
    shapes = {
        "model.embed_tokens.weight": (8, 192), "model.norm.weight": (192,), "input_layernorm.weight": (192,),
        "post_attention_layernorm.weight": (192,), "self_attn.q_proj.weight": (576, 192), "self_attn.k_proj.weight": (288, 192),
        "self_attn.v_proj.weight": (288, 192), "self_attn.o_proj.weight": (192, 576), "mlp.gate_proj.weight": (160, 192),
        "mlp.up_proj.weight": (160, 192), "mlp.down_proj.weight": (192, 160),
    }  # fmt: skip
    tensors = {
        name if name.startswith("model.") else f"model.layers.0.{name}": rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    names = [name for name in tensors if "proj" in name]
    stored, meaning = quantized({name: value.astype(np.float32) for name, value in tensors.items()}, names, block)
    stored = {name: stored[name] if name in names or "scale" in name else tensors[name] for name in stored}
    return write_checkpoint(directory, content, stored | changes), meaning


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)], ids=["128x128", "64x32"])
def test_fp8_blocks_with_partial_edges(block, dtype, tmp_path, caplog):
    directory, meaning = fp8_checkpoint(tmp_path, block, list(block))
    with caplog.at_level(logging.INFO):
        loaded = load_pretrained(directory, dtype=dtype)
    params = parameter_paths(loaded.params)
    expected = "float32" if dtype else "bfloat16"
    assert loaded.config.param_dtype == expected
    assert f"fp8 weights become {expected}" in caplog.text
    for ours, theirs in {"attention/wq": "self_attn.q_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj"}.items():
        value = params[f"dense_layers/{ours}/kernel"][0]
        assert value.dtype == expected
        np.testing.assert_array_equal(value, meaning[f"model.layers.0.{theirs}.weight"].T.astype(value.dtype))


def test_an_fp8_scale_grid_must_cover_its_weight(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    wrong = {f"{name}_scale_inv": np.ones((2, 1), np.float32)}
    directory, _ = fp8_checkpoint(tmp_path / "grid", (128, 128), [128, 128], **wrong)
    with pytest.raises(CheckpointError, match=rf"{name}_scale_inv has shape \[2, 1\]; expected \[2, 2\]"):
        load_pretrained(directory)
    # The grid of 80 x 96 blocks has the same shape as that of 128 x 128: only the config can tell, and it is believed.
    directory, _ = fp8_checkpoint(tmp_path / "size", (128, 128), [64, 64])
    with pytest.raises(CheckpointError, match="Check the weight_block_size"):
        load_pretrained(directory)
    bare = {name: np.ones((160, 192), ml_dtypes.float8_e4m3fn)}
    content = config_of("llama_tied", dtype="bfloat16")
    tensors = tensors_of(content)
    target = "model.layers.0.mlp.up_proj.weight"
    tensors[target] = bare[name][:40, :32]
    with pytest.raises(CheckpointError, match=rf"{target} is of type F8_E4M3 and has no {target}_scale_inv"):
        load_pretrained(write_checkpoint(tmp_path / "bare", content, tensors))


def test_the_tokenizer_comes_along_and_must_fit(tmp_path, caplog):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    with caplog.at_level(logging.INFO):
        assert load_pretrained(directory).tokenizer is None
    assert "brings no tokenizer.json" in caplog.text
    (directory / "tokenizer.json").write_text(json.dumps(word_tokenizer(VOCAB)))
    tokenizer = load_pretrained(directory).tokenizer
    assert tokenizer is not None
    assert tokenizer.encode("w3 w1").tolist() == [3, 1]
    (directory / "tokenizer.json").write_text(json.dumps(word_tokenizer(VOCAB + 1)))
    with pytest.raises(CheckpointError, match=f"tokenizer has {VOCAB + 1} tokens, vocab_size of config.json is {VOCAB}"):
        load_pretrained(directory)


def word_tokenizer(n_words):
    """A tokenizer.json with words w0, w1, ... and the end of a document as its last token."""
    vocab = {f"w{i}": i for i in range(n_words - 1)} | {"<|endoftext|>": n_words - 1}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }  # fmt: skip


def test_shapes_of_covers_the_layers():
    assert sum(name.startswith("model.layers.2.") for name in shapes_of(config_of("llama"))) == 13


def test_a_file_written_by_the_package_reads_the_same(tmp_path):
    from dsa_jax.hf.safetensors_file import DTYPES, read_header, read_tensor

    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 2, (3, 4)).astype(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": np.array(3.0, np.float32), "empty": np.zeros((0, 5), np.float32)}
    save_file(tensors, tmp_path / "all.safetensors")
    header = read_header(tmp_path / "all.safetensors")
    with (tmp_path / "all.safetensors").open("rb") as stream:
        for name, value in tensors.items():
            read = read_tensor(stream, name, header[name])
            assert read.dtype == value.dtype
            np.testing.assert_array_equal(read, value)
