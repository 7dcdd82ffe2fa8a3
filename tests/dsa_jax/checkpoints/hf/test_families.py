"""Families as rows: one added from outside is read and written, and what a row leaves out or the model lacks is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.checkpoints.hf import (
    CheckpointError,
    Family,
    FamilyIndexer,
    Router,
    read_model_config,
    register_family,
    registered_family,
)
from dsa_jax.checkpoints.hf.families import FAMILIES
from tests.dsa_jax.checkpoints.hf.test_save import assert_same, config_json, drawn
from tests.dsa_jax.checkpoints.hf.tiny import CASES, LAYERS, config_of, read_tensors, tensors_of, write_checkpoint
from tests.dsa_jax.toys.family import TOY

LLAMA, DEEPSEEK_V3 = FAMILIES["llama"], FAMILIES["deepseek_v3"]
# Near neighbours that are not in the table, as far as these columns say what they are.
MISTRAL = dataclasses.replace(
    LLAMA, biases="none", windows="sliding_window", defaults={**LLAMA.defaults, "sliding_window": 4096}
)
QWEN2 = dataclasses.replace(
    LLAMA,
    biases="qkv",
    windows="max_window_layers",
    defaults={**LLAMA.defaults, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
)
SMOLLM3 = dataclasses.replace(LLAMA, rotated="no_rope_layers")
OLMO3 = dataclasses.replace(LLAMA, windows="layer_types")
GLM4_MOE = dataclasses.replace(
    LLAMA,
    biases="attention_bias_qkv",
    rotated="partial_rotary_factor",
    router=DEEPSEEK_V3.router,
    mtp_layers=True,
    defaults={**DEEPSEEK_V3.defaults, "rope_interleave": False, "partial_rotary_factor": 0.5, "n_group": 1, "topk_group": 1},
)
EXPERTS = {
    name: value
    for name, value in CASES["deepseek_v3"][0].items()
    if not name.startswith(("q", "kv_", "v_", "num_key", "model_type"))
}


def plain(model_type, **changes):
    """The config.json of a llama without biases under another model_type."""
    return config_of("llama", model_type=model_type, **({"attention_bias": False} | changes))


def with_qkv_biases(content):
    """Its tensors, with biases of q, k and v."""
    return {name: value for name, value in tensors_of(content | {"attention_bias": True}).items() if "o_proj.bias" not in name}


def refused(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        read_model_config(write_checkpoint(tmp_path / "refused", content, {}))


def logits(loaded):
    ids = jnp.arange(24, dtype=jnp.int32)[None] % 48
    return jax.jit(loaded.model.apply)({"params": loaded.params}, ids).logits


def assert_reloads(directory, loaded):
    """Saving and loading gives the same model and the same bits; returns the config.json written."""
    save_pretrained(directory, loaded.config, loaded.params)
    again = load_pretrained(directory)
    assert again.config == loaded.config
    assert_same(again.params, loaded.params)
    return config_json(directory)


def test_a_family_from_outside_loads_saves_and_reloads(tmp_path):
    content = plain("toy", rms_norm_eps=..., attention_bias=...) | {"head_dim": 6}
    tensors = with_qkv_biases(content | {"tie_word_embeddings": False})
    directory = write_checkpoint(tmp_path / "theirs", content, tensors)
    with registered_family("toy", TOY):
        loaded = load_pretrained(directory)
        assert (loaded.config.family, loaded.config.norm_eps, loaded.config.attention.head_dim) == ("toy", 3e-3, 6)
        assert (loaded.config.attention.use_bias, loaded.config.attention.use_out_bias) == (True, False)
        written = assert_reloads(tmp_path / "ours", loaded)
        assert (written["model_type"], written["architectures"]) == ("toy", ["ToyForCausalLM"])
        assert not {"dsa_jax", "attention_bias"} & written.keys()
    ours = read_tensors(tmp_path / "ours")
    assert sorted(ours) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    with pytest.raises(CheckpointError, match="model_type is 'toy'; expected one of"):
        load_pretrained(directory)


def test_a_family_keeps_its_name_beside_others_that_could_hold_the_model(tmp_path):
    """A twin of llama is written as itself, a model of no family as the row that comes first."""
    with registered_family("twin", dataclasses.replace(LLAMA, architecture="TwinForCausalLM")):
        loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("llama", model_type="twin")))
        for family, model_type in {"twin": "twin", "": "llama"}.items():
            config = dataclasses.replace(loaded.config, family=family)
            save_pretrained(tmp_path / "ours", config, loaded.params)
            assert config_json(tmp_path / "ours")["model_type"] == model_type


def test_biases_of_q_k_and_v_alone(tmp_path):
    """The same logits as a llama with biases everywhere, whose output bias is zero."""
    content = plain("qwen2")
    tensors = with_qkv_biases(content)
    with registered_family("qwen2", QWEN2):
        loaded = load_pretrained(write_checkpoint(tmp_path / "qkv", content, tensors))
        assert_reloads(tmp_path / "ours", loaded)
    zeros = {f"model.layers.{i}.self_attn.o_proj.bias": np.zeros(32, np.float32) for i in range(LAYERS)}
    everywhere = load_pretrained(write_checkpoint(tmp_path / "all", config_of("llama"), tensors | zeros))
    np.testing.assert_array_equal(logits(loaded), logits(everywhere))
    without = {name: value for name, value in tensors.items() if not name.endswith("bias")}
    unbiased = load_pretrained(write_checkpoint(tmp_path / "none", plain("llama"), without))
    assert float(jnp.abs(logits(loaded) - logits(unbiased)).max()) > 1e-3
    with pytest.raises(CheckpointError, match=r"holds .*self_attn\.k_proj\.bias \[16\].* which the model .* no use for"):
        load_pretrained(write_checkpoint(tmp_path / "extra", plain("llama"), tensors))
    with registered_family("qwen2", QWEN2), pytest.raises(CheckpointError, match=r"lacks .*self_attn\.q_proj\.bias"):
        load_pretrained(write_checkpoint(tmp_path / "lacking", content, without))


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        (MISTRAL, {"sliding_window": 16}),
        (MISTRAL, {}),  # 4096 where it is absent
        (MISTRAL, {"use_sliding_window": False}),  # which transformers does not read in this family
        (QWEN2, {"use_sliding_window": True, "max_window_layers": LAYERS - 1}),
        (dataclasses.replace(QWEN2, windows="use_sliding_window"), {"use_sliding_window": True}),
        (LLAMA, {"sliding_window": 16}),
    ],
    ids=["size", "default size", "switch is not read", "some layers", "all layers", "a family without windows"],
)
def test_a_window_in_any_layer_is_refused(row, changes, tmp_path):
    with registered_family("windowed", row):
        refused(tmp_path, plain("windowed", **changes), r"sliding_window is \d+; expected null, .* only full attention")


def test_windows_that_are_off(tmp_path):
    """They are, and saving says so where the family's default is on."""
    with registered_family("mistral", MISTRAL):
        loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", plain("mistral", sliding_window=None)))
        written = assert_reloads(tmp_path / "ours", loaded)
        assert (written["model_type"], written["sliding_window"]) == ("mistral", None)
    with registered_family("qwen2", QWEN2):
        for changes in ({}, {"use_sliding_window": True}, {"use_sliding_window": True, "sliding_window": None}):
            read_model_config(write_checkpoint(tmp_path / "qwen2", plain("qwen2", **changes), {}))
    silent = dataclasses.replace(MISTRAL, defaults=LLAMA.defaults)
    with registered_family("silent", silent):
        refused(tmp_path, plain("silent"), "lacks sliding_window, without which the model is not defined")


def test_windows_layer_by_layer(tmp_path):
    with registered_family("olmo3", OLMO3):
        refused(tmp_path, plain("olmo3"), "lacks layer_types, without which the model is not defined")
        refused(tmp_path, plain("olmo3", layer_types=None), "layer_types is None; expected a list of full_attention")
        mixed = ["sliding_attention", "sliding_attention", "full_attention"]
        refused(tmp_path, plain("olmo3", layer_types=mixed, sliding_window=16), r"layer_types is \['sliding_attention'")
        content = plain("olmo3", layer_types=["full_attention"] * LAYERS, sliding_window=16)
        loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", content))
        assert_reloads(tmp_path / "ours", loaded)


def test_layers_and_channels_without_rotation_are_refused(tmp_path):
    with registered_family("smollm3", SMOLLM3):
        refused(tmp_path, plain("smollm3"), "lacks no_rope_layers")
        refused(tmp_path, plain("smollm3", no_rope_layers=[1, 1, 0]), r"no_rope_layers is \[1, 1, 0\]; expected null")
        assert (
            read_model_config(write_checkpoint(tmp_path / "all", plain("smollm3", no_rope_layers=None), {})).n_layers == LAYERS
        )
    with registered_family("glm4_moe", GLM4_MOE):
        refused(tmp_path, plain("glm4_moe", **EXPERTS), "partial_rotary_factor is 0.5; expected 1")


def test_a_router_of_one_family_with_the_attention_of_another(tmp_path):
    """As in glm4_moe, where it rotates every channel: saving then states that against the family's default."""
    content = plain("glm4_moe", partial_rotary_factor=1.0, attention_bias=True, num_nextn_predict_layers=1, **EXPERTS)
    tensors = with_qkv_biases(content) | {f"model.layers.{LAYERS}.eh_proj.weight": np.ones((2, 2), np.float32)}
    with registered_family("glm4_moe", GLM4_MOE):
        loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", content, tensors))
        assert (loaded.config.attention.use_bias, loaded.config.attention.use_out_bias) == (True, False)
        assert (loaded.config.moe.scoring, loaded.config.moe.n_shared_experts) == ("sigmoid", 2)
        written = assert_reloads(tmp_path / "ours", loaded)
        assert (written["model_type"], written["partial_rotary_factor"]) == ("glm4_moe", 1)


@pytest.mark.parametrize(
    ("row", "column"), [(row, field.name) for row in (Family, Router, FamilyIndexer) for field in dataclasses.fields(row)]
)
def test_a_row_that_leaves_a_column_out(row, column):
    complete = {Family: TOY, Router: DEEPSEEK_V3.router, FamilyIndexer: FAMILIES["glm_moe_dsa"].indexer}[row]
    columns = {field.name: getattr(complete, field.name) for field in dataclasses.fields(row)}
    assert row(**columns) == complete
    del columns[column]
    with pytest.raises(TypeError, match=f"missing .* argument: '{column}'"):
        row(**columns)


@pytest.mark.parametrize(
    ("row", "column", "value"),
    [
        (LLAMA, "extras", ("attention_sinks",)),  # gpt_oss
        (LLAMA, "extras", ("one_plus_norm_weight", "norms_after_sublayers", "scaled_embedding")),  # gemma3_text
        (LLAMA, "attention", "linear"),
        (LLAMA, "windows", "alternating"),
        (LLAMA, "biases", "o"),
        (LLAMA, "rotated", "learned"),
        (DEEPSEEK_V3.router, "scoring", "tanh"),
        (DEEPSEEK_V3.router, "topk_methods", ("hash",)),
        (FAMILIES["deepseek_v32"].indexer, "rope_layout", "none"),
    ],
)
def test_what_the_model_does_not_compute_cannot_be_stated(row, column, value):
    with pytest.raises(ValueError, match=f"{type(row).__name__}.{column} is .*; expected one of .*: extend it first"):
        dataclasses.replace(row, **{column: value})


@pytest.mark.parametrize(("default", "message"), [("gelu", "is 'gelu'; expected silu"), (None, "lacks hidden_act")])
def test_an_activation_is_judged_where_config_json_leaves_it_out(default, message, tmp_path):
    defaults = {name: value for name, value in LLAMA.defaults.items() if name != "hidden_act"}
    defaults |= {"hidden_act": default} if default else {}
    with registered_family("other", dataclasses.replace(LLAMA, defaults=defaults)):
        refused(tmp_path, plain("other", hidden_act=...), message)


def test_a_name_is_given_once():
    for taken in ("llama", "dsa_jax"):
        with pytest.raises(ValueError, match=f"model_type '{taken}' is taken"):
            register_family(taken, TOY)
    with pytest.raises(KeyError), registered_family("toy", TOY):
        assert FAMILIES["toy"] is TOY
        raise KeyError
    assert "toy" not in FAMILIES


def test_a_model_of_no_family_keeps_the_order_of_its_index_channels(tmp_path):
    """Its family of origin stores them interleaved; what is written without a family is as it is here."""
    config = read_model_config(write_checkpoint(tmp_path / "glm", config_of("glm_moe_dsa", indexer_rope_interleave=False), {}))
    config.moe.scoring, config.moe.use_score_bias = "softmax", False
    params = drawn(config)
    save_pretrained(tmp_path / "ours", config, params)
    assert config_json(tmp_path / "ours")["model_type"] == "dsa_jax"
    loaded = load_pretrained(tmp_path / "ours")
    assert loaded.config == config
    assert_same(loaded.params, params)
