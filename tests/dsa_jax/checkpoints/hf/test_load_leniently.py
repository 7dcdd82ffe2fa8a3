"""Checkpoints that other programs read although something about them is unusual."""

import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.checkpoints.hf import CheckpointError, read_model_config
from dsa_jax.params import parameter_paths
from tests.dsa_jax.checkpoints.hf.tiny import LAYERS, Q_RANK, VOCAB, _indexer, config_of, tensors_of, write_checkpoint

NAME = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def change_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("overlay", ["overlay.safetensors", "a-first.safetensors"])
def test_an_overlay_counts_for_more_than_a_stale_copy(overlay, tmp_path, caplog):
    content = config_of("llama")
    tensors = tensors_of(content)
    directory = write_checkpoint(tmp_path, content, tensors, n_files=2)
    save_file({NAME: tensors[NAME] + 1, "model.norm.weight": tensors["model.norm.weight"] + 1}, directory / overlay)
    change_index(directory, lambda names: names.update({NAME: overlay, "model.norm.weight": overlay}))
    params = parameter_paths(load_pretrained(directory).params)
    np.testing.assert_array_equal(params["dense_layers/mlp/up/kernel"][1], (tensors[NAME] + 1).T)
    np.testing.assert_array_equal(params["final_norm/scale"], tensors["model.norm.weight"] + 1)
    assert f"assigns to one, which counts: {NAME} and 1 more" in caplog.text


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(4, np.float32)),
        ("llama", "model.layers.0.mlp.shared_experts.up_proj.weight", np.zeros((0, 32), np.float32)),
        ("deepseek_v3", f"model.layers.{LAYERS}.eh_proj.weight", np.ones((2, 2), np.float32)),
        ("llama_tied", "lm_head.weight", None),
    ],
    ids=["inv_freq", "empty", "multi-token prediction", "tied head"],
)
def test_unlisted_tensors_that_no_parameter_takes(case, name, value, tmp_path):
    content = config_of(case)
    tensors = tensors_of(content)
    plain = load_pretrained(write_checkpoint(tmp_path / "plain", content, tensors)).params
    more = tensors | {name: tensors["model.embed_tokens.weight"] if value is None else value}
    directory = write_checkpoint(tmp_path / "more", content, more, n_files=2)
    change_index(directory, lambda names: names.pop(name))
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(directory).params, plain)


def test_an_unlisted_tensor_that_is_not_known_is_an_error(tmp_path):
    content = config_of("llama")
    directory = write_checkpoint(tmp_path, content, tensors_of(content) | {"model.extra": np.ones(3, np.float32)}, n_files=2)
    change_index(directory, lambda names: names.pop("model.extra"))
    with pytest.raises(CheckpointError, match=r"model\.extra \[3\], which the model .* no use for"):
        load_pretrained(directory)


def with_dtype(directory, name, dtype, n_bytes, shape):
    """Add a tensor of a type that numpy does not have to the one file of a checkpoint."""
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + n_bytes]}
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data + bytes(n_bytes))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (f"model.layers.{LAYERS}.mlp.experts.0.up_proj.weight", "F4"),
        (f"model.layers.{LAYERS}.mlp.experts.0.up_proj.weight_scale_inv", "F8_E8M0"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "C64"),
    ],
)
def test_types_that_are_not_known_on_tensors_that_are_skipped(name, dtype, tmp_path):
    content = config_of("deepseek_v3")
    plain = load_pretrained(write_checkpoint(tmp_path / "plain", content)).params
    directory = write_checkpoint(tmp_path / "more", content)
    with_dtype(directory, name, dtype, 8, [16])
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(directory).params, plain)


def test_a_tied_head_of_a_type_that_is_not_known(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama_tied"))
    with_dtype(directory, "lm_head.weight", "F4", 768, [VOCAB, 32])
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has dtype F4"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "sharing",
    [
        {"index_topk_freq": 2, "index_skip_topk_offset": 2},
        {"index_topk_pattern": "FFS"},
        {"indexer_types": ["full", "full", "shared"]},
    ],
    ids=lambda sharing: next(iter(sharing)),
)
def test_layers_may_share_over_weights_that_have_every_indexer(sharing, tmp_path, caplog):
    content = config_of("glm_moe_dsa_shared")
    tensors = tensors_of(content)
    plain = load_pretrained(write_checkpoint(tmp_path / "plain", content, tensors)).params
    every = {f"model.layers.2.{name}": np.ones(shape, np.float32) for name, shape in _indexer(Q_RANK).items()}
    content = config_of("glm_moe_dsa", **sharing)
    with caplog.at_level(logging.INFO):
        loaded = load_pretrained(write_checkpoint(tmp_path / "every", content, tensors | every))
    assert loaded.config.attention.layer_types == ("full", "full", "shared")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, plain)
    assert "layers 2 reuse a selection by config.json" in caplog.text


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("stated", "longest"),
    [
        ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "yarn", "factor": 2.5}}, 81920),
        ({"max_position_embeddings": 262144, "rope_scaling": YARN}, 262144),
        ({"max_position_embeddings": 40960, "rope_scaling": YARN | {"rope_type": "default"}}, 40960),
    ],
)
def test_yarn_by_the_model_card_reaches_as_far_as_it_says(stated, longest, tmp_path):
    assert read_model_config(write_checkpoint(tmp_path, config_of("qwen3", **stated))).max_positions == longest


def test_an_export_keeps_a_length_below_that_of_its_scaling(tmp_path, caplog):
    loaded = load_pretrained(write_checkpoint(tmp_path / "hf", config_of("qwen3", rope_scaling=YARN)))
    loaded.config.max_positions = 4096
    save_pretrained(tmp_path / "out", loaded.config, loaded.params)
    config = read_model_config(tmp_path / "out")
    assert (config.family, config.max_positions) == ("qwen3", 4096)
    assert "only dsa-jax" not in caplog.text
