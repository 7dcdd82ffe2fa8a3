"""Files of a checkpoint directory that say anything at all: it loads, or one line names the file and the field, soon."""

import itertools
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest

from dsa_jax import load_pretrained
from dsa_jax.checkpoints.from_hf import resolve_checkpoint
from dsa_jax.checkpoints.hf import CheckpointError, read_model_config
from dsa_jax.checkpoints.hf.read_config import parse_config
from dsa_jax.checkpoints.hf.safetensors_file import read_header
from dsa_jax.checkpoints.open import is_hf_directory, open_checkpoint
from dsa_jax.config import Config
from tests.dsa_jax.checkpoints.hf.tiny import CASES, config_of, tensors_of, write_checkpoint

DEEP = "[" * 100_000 + "]" * 100_000
VALUES = {
    "null": None, "true": True, "zero": 0, "negative": -1, "half": 0.5, "larger": 10**30, "nan": math.nan, "huge": 1e300,
    "escape": "\x1b[2J\x07" * 400, "numbers": [1, "a", None], "objects": [{"a": []}], "nested": {"rope_type": {"a": [[1]]}},
}  # fmt: skip
FAMILIES = ("llama", "qwen3_moe", "deepseek_v2", "glm_moe_dsa_shared")


def one_line(error):
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 1500, text
    return text


def fields_of(case):
    content = config_of(case)
    more = {"mlp_layer_types": 0, "layer_types": 0, "index_topk_pattern": 0, "indexer_types": 0, "quantization_config": 0}
    more |= {"dsa_jax": 0, "rope_parameters": 0, "dtype": 0, "head_dim": 0, "num_experts": 0, "num_nextn_predict_layers": 0}
    more |= {"index_n_heads": 0, "index_head_dim": 0, "index_topk": 0, "index_norm_eps": 0, "sliding_window": 0}
    return [*content, *(name for name in more if name not in content)]


@pytest.mark.parametrize("case", FAMILIES)
def test_every_field_may_hold_anything(case):
    told = 0
    for name, value in itertools.product(fields_of(case), VALUES.values()):
        began = time.monotonic()
        try:
            assert parse_config(config_of(case) | {name: value}, Path("config.json")).n_layers <= 10_000
        except CheckpointError as error:
            text, told = one_line(error), told + 1
            assert "config.json" in text, text
        assert time.monotonic() - began < 2
    assert told > len(fields_of(case)) * len(VALUES) / 3


@pytest.mark.parametrize("name", ["rope_theta", "factor", "original_max_position_embeddings", "rope_type", "beta_fast"])
def test_every_field_of_the_rotation_may_hold_anything(name, tmp_path):
    directory = write_checkpoint(tmp_path, config_of("deepseek_v3"))
    for value in VALUES.values():
        content = config_of("deepseek_v3", rope_theta=...)
        content["rope_scaling"] = content["rope_scaling"] | {name: value}
        (directory / "config.json").write_text(json.dumps(content))
        try:
            assert read_model_config(directory).n_layers == 3
        except CheckpointError as error:
            one_line(error)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "nested more than 100 deep"),
        ('{"a": ' * 100_000, "nested more than 100 deep"),
        ('{"model_type": ' + DEEP + "}", "nested more than 100 deep"),
        ("[" * 101 + "]" * 101, "nested more than 100 deep"),
        ('{"model_type": ' + "9" * 400 + "}", "a number has 400 digits; expected at most 100"),
        ('{"a": -' + "9" * 5000 + "}", "a number has 5001 digits; expected at most 100"),
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ("\x00", "is not JSON"),
        ('"text"', "holds a str; expected a JSON object"),
    ],
    ids=range(9),
)
def test_json_that_is_no_config(file, text, reason, tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"), n_files=2)
    (directory / file).write_text(text)
    assert is_hf_directory(directory)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(directory)
    assert file in one_line(caught.value)


def test_files_that_are_none(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: expected a regular file"):
        open_checkpoint(directory)
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        open_checkpoint(directory)
    (directory / "config.json").unlink()
    with (directory / "config.json").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(CheckpointError, match=r"has 1099511627776 bytes; expected at most"):
        open_checkpoint(directory)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number from 1 to"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected a whole number from 1 to 10000"),
        ("llama", {"num_hidden_layers": 4}, "num_hidden_layers is 4, but the weights hold 3 layers"),
        ("deepseek_v32", {"index_n_heads": 2**31 - 1}, "indexer.n_heads is 2147483647; expected zero or more, up to 4096"),
        ("deepseek_v32", {"index_n_heads": 2**63}, "index_n_heads is 9223372036854775808; expected a whole number"),
        ("deepseek_v3", {"n_routed_experts": 8}, "routed experts is 8, but the weights hold 4"),
        ("deepseek_v3", {"n_routed_experts": 2**20}, "n_routed_experts is 1048576; expected zero or more, up to 65536"),
        ("llama", {"vocab_size": 2**23}, "vocab_size is 8388608, more than the largest tensor"),
        ("deepseek_v3", {"kv_lora_rank": 2**23}, "kv_lora_rank is 8388608, more than the largest tensor"),
        ("llama", {"dsa_jax": {"n_layers": 10**9}}, "n_layers is 1000000000; expected a positive number from 1 to 10000"),
        ("llama", {"dsa_jax": {"logits_scale": math.nan}}, "logits_scale is nan; expected a positive number"),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps is inf; expected a number from 0 to 1"),
        ("llama", {"rms_norm_eps": 1e300}, "rms_norm_eps is 1e+300; expected a number from 0 to 1"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06; expected a number from 0 to 1"),
        ("llama", {"rope_theta": math.nan}, "rope_theta is nan; expected a number from 1 to 1e+15"),
        ("llama", {"rope_theta": 1e300}, "rope_theta is 1e+300; expected a number from 1 to 1e+15"),
        ("deepseek_v3", {"routed_scaling_factor": math.inf}, "routed_scaling_factor is inf; expected a number from 1e-06"),
        ("deepseek_v3", {"routed_scaling_factor": 0}, "routed_scaling_factor is 0; expected a number from 1e-06"),
        ("deepseek_v32", {"index_norm_eps": math.nan}, "index_norm_eps is nan; expected a number from 0 to 1"),
        ("qwen3", {"initializer_range": math.inf}, "initializer_range is inf; expected a number from 0 to 1000"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 1e300}}, "rope_scaling.factor is 1e+300; expected a number"),
        ("llama", {"hidden_size": 2, "head_dim": ...}, "num_attention_heads is 4; expected at most hidden_size (2)"),
        ("llama", {"eos_token_id": [2, 10**40]}, "eos_token_id is [2, 1000"),
        ("llama", {"\x1b]0;x\x07rope": 1.5}, "\\x1b]0;x\\x07rope is 1.5; expected null or false"),
    ],
    ids=str,
)
def test_sizes_and_scales_are_refused_before_anything_is_built(case, changes, message, tmp_path):
    directory = write_checkpoint(tmp_path, config_of(case))
    (directory / "config.json").write_text(json.dumps(config_of(case, **changes)))
    config = Config()
    config.init.hf_dir = str(directory)
    for call in (lambda: load_pretrained(directory), lambda: resolve_checkpoint(config)):
        began = time.monotonic()
        with pytest.raises(CheckpointError) as caught:
            call()
        assert time.monotonic() - began < 2
        assert message in one_line(caught.value)


def test_the_fixtures_are_within_all_bounds(tmp_path):
    for case in CASES:
        assert read_model_config(write_checkpoint(tmp_path / case, config_of(case))).n_layers == 3


def test_tensor_and_file_names_reach_no_terminal_raw(tmp_path, caplog):
    content = config_of("llama", **{"\x1b[31mred": 1})
    hostile = "model.layers.0.\x1b[2J\u202e.weight"
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J\\u202e") as caught:
        load_pretrained(write_checkpoint(tmp_path / "one", content, tensors_of(content) | {hostile: np.ones(2, np.float32)}))
    one_line(caught.value)
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert "\\x1b[31mred" in caplog.text
    directory = write_checkpoint(tmp_path / "two", config_of("llama"), n_files=2)
    index = directory / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for file in ("\x1b[2J.safetensors", "\ud800", "\0", "x" * 5000):
        index.write_text(json.dumps({"weight_map": names | {"model.norm.weight": file}}))
        with pytest.raises(CheckpointError, match="names") as caught:
            load_pretrained(directory)
        one_line(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]},
        {"dtype": "F32"},
    ],
)
def test_names_in_a_damaged_header_reach_no_terminal_raw(tmp_path, entry):
    header = json.dumps({"\x1b[2J\n": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"\\x1b\[2J\\n") as caught:
        read_header(file)
    one_line(caught.value)
