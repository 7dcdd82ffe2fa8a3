"""Reading config.json: what its fields decide, and errors that name a field that is refused or missing."""

import json
import re

import numpy as np
import pytest

from dsa_jax import load_pretrained
from dsa_jax.checkpoints.hf import CheckpointError, read_model_config
from tests.dsa_jax.checkpoints.hf.tiny import LAYERS, config_of, write_checkpoint


@pytest.mark.parametrize(("stated", "ends"), [([5, 6], (2, 3, 5, 6)), (3, (2, 3)), (None, (2, 3))], ids=str)
def test_generation_config_adds_to_what_ends_a_text(tmp_path, stated, ends):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert read_model_config(directory).eos_token_ids == ends


@pytest.mark.parametrize("stated", [[2, 99_999], -1, [48, 3]], ids=["beyond", "none", "the first beyond"])
def test_end_tokens_that_no_model_can_write_end_nothing(tmp_path, stated, caplog):
    directory = write_checkpoint(tmp_path, config_of("llama", eos_token_id=2), {})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert read_model_config(directory).eos_token_ids == ((2, 3) if stated == [48, 3] else (2,))
    assert "generation_config.json: eos_token_id [" in caplog.text and "no token of the model" in caplog.text


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
    assert config.attention.layer_types == layer_types
    assert config.attention.indexer.rope_layout == "interleaved"


def test_the_index_rotation_is_the_one_the_config_names(tmp_path):
    config = read_model_config(write_checkpoint(tmp_path, config_of("glm_moe_dsa", indexer_rope_interleave=False)))
    assert config.attention.indexer.rope_layout == "half_split"


@pytest.mark.parametrize("kind", ["indexed_attention", "deepseek_sparse_attention"])
def test_layer_types_of_sparse_models(kind, tmp_path):
    directory = write_checkpoint(tmp_path, config_of("deepseek_v32", layer_types=[kind] * 3))
    assert read_model_config(directory).attention.mode == "sparse"


def test_the_original_length_beside_the_scaling_wins(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    content = config_of("llama", rope_scaling=scaling, original_max_position_embeddings=32)
    assert read_model_config(write_checkpoint(tmp_path, content)).attention.rope.original_max_positions == 32


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
    from dsa_jax.model.rope import Rope, rotary_magnitude

    content = config_of("deepseek_v3", rope_scaling={"rope_type": "yarn", "factor": 4.0} | scaling)
    rope = read_model_config(write_checkpoint(tmp_path, content)).attention.rope
    assert rotary_magnitude(Rope(8, "interleaved", rope)) == pytest.approx(magnitude, rel=1e-12)
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
        ("llama", {"layer_types": 5}, "layer_types is 5; expected a list of full_attention"),
        ("llama", {"dsa_jax": "x"}, "dsa_jax is 'x'; expected an object"),
        ("llama", {"dsa_jax": {"vocab_size.x": 1}}, "there is no config field vocab_size.x"),
        ("llama", {"dsa_jax": {"logits_scale": "abc"}}, "dsa_jax.logits_scale is 'abc'; expected int or float"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings is 0; expected a whole number from 1 to",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "mscale_all_dim": 1.0}},
            "rope_scaling.mscale_all_dim is 1.0; expected none of it",
        ),
        ("llama", {"torch_dtype": "float64"}, "torch_dtype is 'float64'; expected one of float32, float, bfloat16, float16"),
        ("llama", {"num_hidden_layers": "three"}, "num_hidden_layers is 'three'; expected a whole number"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method is 'gptq'"),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            "quantization_config.weight_block_size is None",
        ),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "sliding_window is 16; expected null"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": ..., "max_window_layers": 0}, "sliding_window is 4096"),
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
        ("glm_moe_dsa", {"indexer_types": ["shared", "full", "full"]}, "a 'shared' layer before the first 'full' one"),
        ("glm4_moe_lite", {"head_dim": 16}, "head_dim is 16; expected qk_rope_head_dim (8)"),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(case, changes, message, tmp_path):
    content = {name: value for name, value in config_of(case, **changes).items() if value is not ...}  # as if it were not there
    directory = write_checkpoint(tmp_path, content, {})
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_model_config(directory)
    assert message in str(caught.value)


def test_a_sliding_window_that_no_layer_uses_is_no_obstacle(tmp_path):
    content = config_of("qwen3", use_sliding_window=True, max_window_layers=LAYERS)
    assert read_model_config(write_checkpoint(tmp_path, content, {})).n_layers == LAYERS
    del content["max_window_layers"]  # 28, which are all
    assert read_model_config(write_checkpoint(tmp_path, content, {})).n_layers == LAYERS


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "half"}, "float32"),
    ],
    ids=str,
)
def test_the_newer_spelling_of_the_dtype_counts(stated, expected, tmp_path):
    content = config_of("llama")
    content.pop("dtype", None)
    content.pop("torch_dtype", None)
    assert read_model_config(write_checkpoint(tmp_path, content | stated, {})).param_dtype == expected


def test_a_flag_that_is_null_is_false(tmp_path):
    content = config_of("deepseek_v3")
    assert read_model_config(write_checkpoint(tmp_path, content, {})).moe.normalize_weights
    content["norm_topk_prob"] = None
    assert not read_model_config(write_checkpoint(tmp_path, content, {})).moe.normalize_weights


@pytest.mark.parametrize("missing", ["hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"])
def test_fields_that_are_needed_are_named(missing, tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama", **{missing: ...}), {})
    with pytest.raises(CheckpointError, match=f"lacks {missing}"):
        read_model_config(directory)


def test_an_unknown_family_gets_the_list_of_known_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_type is 'gpt9'.*deepseek_v32.*qwen3_moe"):
        load_pretrained(write_checkpoint(tmp_path, config_of("llama", model_type="gpt9")))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"rope_interleaved": True}, "rope_interleaved is True; expected false"),
        ("qwen3", {"rotary_interleaved": True}, "rotary_interleaved is True; expected false"),
        ("llama", {"is_neox_style": False}, "is_neox_style is False; expected true"),
        ("deepseek_v3", {"rope_interleaved": False}, "rope_interleaved is False; expected true"),
        ("llama", {"rotary_pct": 0.25}, "rotary_pct is 0.25; expected null or false"),
        ("llama", {"rope_ratio": 16}, "rope_ratio is 16; expected null or false"),
        ("llama", {"use_rope": False}, "use_rope is False; expected true"),
        ("deepseek_v3", {"use_rotary_embedding": False}, "use_rotary_embedding is False; expected true"),
        ("llama", {"rotary_dim": 0}, "rotary_dim is 0; expected null or false"),
        ("qwen3", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'; expected null or false"),
        ("llama", {"use_alibi": True}, "use_alibi is True; expected null or false"),
        ("llama", {"use_dynamic_ntk": True}, "use_dynamic_ntk is True; expected null or false"),
        ("llama", {"nope_layer_interval": 4}, "nope_layer_interval is 4; expected null or false"),
        ("llama", {"neox_style": False}, "neox_style is False; expected true"),
    ],
)
def test_fields_that_turn_other_channels_are_no_unknown_fields(case, changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_model_config(write_checkpoint(tmp_path, config_of(case, **changes), {}))


def test_spellings_of_the_rotation_that_is_computed_are_read(tmp_path):
    neutral = {"rope_interleaved": False, "is_neox_style": True, "rotary_pct": 1.0, "rope_ratio": None}
    neutral |= {"use_rope": True, "position_embedding_type": "rope", "nope_layer_interval": 0, "use_alibi": False}
    llama = read_model_config(write_checkpoint(tmp_path, config_of("llama", **neutral), {}))
    assert llama.attention.rope_layout == "half_split"
    deepseek = read_model_config(write_checkpoint(tmp_path, config_of("deepseek_v3", rope_interleaved=True), {}))
    assert deepseek.attention.rope_layout == "interleaved"


YARN_TWICE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": YARN_TWICE | {"rope_theta": 1e4}},
            "rope_parameters.rope_theta is 1000000.0, but rope_scaling.rope_theta is 10000.0; expected one value",
        ),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_theta is 10000.0, but rope_parameters.rope_theta is 1000000.0",
        ),
        (
            {"rope_parameters": YARN_TWICE, "rope_scaling": YARN_TWICE | {"factor": 8.0}},
            "rope_parameters.factor is 4.0, but rope_scaling.factor is 8.0",
        ),
        (
            {"rope_parameters": YARN_TWICE, "rope_scaling": {"type": "llama3", "factor": 4.0}},
            "rope_parameters.rope_type is 'yarn', but rope_scaling.type is 'llama3'",
        ),
        ({"rope_scaling": YARN_TWICE | {"type": "default"}}, "rope_scaling.rope_type is 'yarn', but rope_scaling.type is"),
    ],
)
def test_rotations_that_disagree_are_an_error(stated, message, tmp_path):
    content = config_of("llama", rope_theta=..., rope_scaling=...) | stated
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_model_config(write_checkpoint(tmp_path, content, {}))


@pytest.mark.parametrize("name", ["factor", "mscale_all_dim", "rope_theta"])
def test_a_rotation_that_is_no_number_is_named_as_such(name, tmp_path):
    content = config_of("llama", rope_theta=..., rope_scaling=...) | {"rope_parameters": YARN_TWICE | {name: float("nan")}}
    with pytest.raises(CheckpointError, match=f"{name} is nan; expected a number"):
        read_model_config(write_checkpoint(tmp_path, content, {}))


def test_rotations_that_agree_are_put_together(tmp_path):
    """A scaling by the model card in a config.json that transformers 5 wrote keeps the theta that stands there."""
    base = {"rope_type": "default", "rope_theta": 1e6}
    content = config_of("llama", rope_theta=..., rope_scaling=YARN_TWICE, rope_parameters=base)
    rope = read_model_config(write_checkpoint(tmp_path, content, {})).attention.rope
    assert (rope.theta, rope.scaling, rope.factor) == (1e6, "yarn", 4.0)
    content = config_of("llama", rope_theta=1e6, rope_scaling=base, rope_parameters=YARN_TWICE | {"mscale": None})
    assert read_model_config(write_checkpoint(tmp_path, content, {})).attention.rope == rope
