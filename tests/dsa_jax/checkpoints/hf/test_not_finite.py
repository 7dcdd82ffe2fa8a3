"""Weights that are NaN or infinite are named when a checkpoint is loaded, whatever it is loaded for."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from dsa_jax import load_pretrained
from dsa_jax.checkpoints.convert import to_run
from dsa_jax.checkpoints.from_hf import checkpoint_params, load_for_evaluation, resolve_checkpoint
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.open import open_checkpoint
from dsa_jax.config import Config
from dsa_jax.run.files import RunError
from dsa_jax.train import init
from tests.dsa_jax.checkpoints.hf.test_load import fp8_checkpoint
from tests.dsa_jax.checkpoints.hf.tiny import EXPERTS, config_of, tensors_of, write_checkpoint

UP = "model.layers.1.mlp.up_proj.weight"


def with_value(directory, value, *, name=UP, place=(7, 3), case="llama", dtype="float32", stored=None):
    content = config_of(case, dtype=dtype)
    tensors = tensors_of(content)
    tensors[name] = tensors[name].astype(stored or tensors[name].dtype)
    tensors[name][place] = value
    return write_checkpoint(directory, content, tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_first_element_is_named(value, dtype, tmp_path):
    directory = with_value(tmp_path, value, dtype=dtype)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {UP}\[7, 3\] is {value}; expected finite weights"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("case", "name", "place"),
    [
        ("llama", "model.embed_tokens.weight", (47, 31)),
        ("llama", "lm_head.weight", (0, 0)),
        ("llama", "model.norm.weight", (31,)),
        ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias", (1,)),
        ("deepseek_v32", "model.layers.2.self_attn.indexer.k_norm.bias", (5,)),
        ("deepseek_v3", f"model.layers.2.mlp.experts.{EXPERTS - 1}.down_proj.weight", (2, 9)),
    ],
)
def test_no_parameter_is_left_out(case, name, place, tmp_path):
    with pytest.raises(CheckpointError, match=f"{name}{list(place)} is nan".replace("[", r"\[")):
        load_pretrained(with_value(tmp_path, np.nan, name=name, place=place, case=case))


def test_fused_experts_are_named_by_their_place_in_the_whole_tensor(tmp_path):
    content = config_of("qwen3_moe")
    tensors = tensors_of(content)
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        each = [[tensors[f"{prefix}.{i}.{p}_proj.weight"] for i in range(EXPERTS)] for p in ("gate", "up", "down")]
        fused[f"{prefix}.gate_up_proj"] = np.concatenate([np.stack(each[0]), np.stack(each[1])], axis=1)
        fused[f"{prefix}.down_proj"] = np.stack(each[2])
    fused["model.layers.2.mlp.experts.gate_up_proj"][1, 20, 4] = np.inf
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.experts\.gate_up_proj\[1, 20, 4\] is inf"):
        load_pretrained(write_checkpoint(tmp_path, content, fused))


def test_numbers_beyond_the_type_of_the_parameters(tmp_path):
    directory = with_value(tmp_path / "wide", 1e300, stored=np.float64)
    with pytest.raises(CheckpointError, match=rf"{UP}\[7, 3\] is 1e\+300, which is beyond float32"):
        load_pretrained(directory)
    largest = with_value(tmp_path / "largest", np.finfo(np.float32).max)
    assert np.isfinite(jax.tree.leaves(load_pretrained(largest).params)[0]).all()
    with pytest.raises(CheckpointError, match=r"is 3\.40282e\+38, which is beyond bfloat16.*dtype float32"):
        load_pretrained(largest, dtype="bfloat16")


@pytest.mark.parametrize("weight_format", ["plain", "fp8_blocks"])
def test_blocks_and_their_scales(weight_format, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    values = np.ones((160, 192), ml_dtypes.float8_e4m3fn)
    values[130, 5] = np.nan
    directory, _ = fp8_checkpoint(tmp_path / "value", (128, 128), [128, 128], **{name: values})
    with pytest.raises(CheckpointError, match=rf"{name}\[130, 5\] is nan"):
        load_pretrained(directory, weight_format=weight_format)
    scales = np.ones((2, 2), np.float32)
    scales[1, 0] = np.inf
    directory, _ = fp8_checkpoint(tmp_path / "scale", (128, 128), [128, 128], **{f"{name}_scale_inv": scales})
    with pytest.raises(CheckpointError, match=rf"{name}(_scale_inv)?\[1(28)?, 0\] is -?inf"):
        load_pretrained(directory, weight_format=weight_format)


def test_weights_that_would_be_quantised_here(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{UP}\[7, 3\] is nan"):
        load_pretrained(with_value(tmp_path, np.nan), weight_format="fp8_blocks")


def test_the_commands_say_it_before_they_run_the_model(tmp_path):
    directory = with_value(tmp_path, np.nan)
    config = Config()
    config.init.hf_dir, config.data.recall_fraction = str(directory), 1.0
    config.eval.recall_sequences, config.eval.text_len = 0, 32
    resolved = resolve_checkpoint(config)
    calls = {
        "generate": lambda: open_checkpoint(directory),
        "evaluate": lambda: load_for_evaluation(config),
        "retrofit": lambda: checkpoint_params(resolved),
        "convert": lambda: to_run(directory, tmp_path / "run"),
    }
    for call in calls.values():
        with pytest.raises(CheckpointError, match=rf"{UP}\[7, 3\] is nan"):
            call()


def test_a_run_with_such_a_parameter(tmp_path, monkeypatch):
    content = config_of("llama")
    (write_checkpoint(tmp_path / "hf", content) / "tokenizer.json").unlink(missing_ok=True)
    to_run(tmp_path / "hf", tmp_path / "run")
    assert init.load_run(tmp_path / "run").step == 0
    restore = init.CheckpointStore.restore

    def damaged(self, *arguments, **options):
        restored = restore(self, *arguments, **options)
        restored.tree["params"]["final_norm"]["scale"] = restored.tree["params"]["final_norm"]["scale"].at[0].set(np.nan)
        return restored

    monkeypatch.setattr(init.CheckpointStore, "restore", damaged)
    with pytest.raises(RunError, match=r"checkpoints/pretrain/0 holds final_norm/scale, which is NaN or infinite"):
        open_checkpoint(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] == "hf"
