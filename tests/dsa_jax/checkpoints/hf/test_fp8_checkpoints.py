"""Checkpoints kept in fp8 blocks: loaded bit for bit or quantised on the way, the same logits, written back as published."""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.checkpoints.convert import to_hf
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf import plan as plan_module
from dsa_jax.checkpoints.hf.plan import Source, check_blocks, read_blocks
from dsa_jax.checkpoints.hf.safetensors_file import TensorToWrite, write_file
from dsa_jax.checkpoints.hf.weights import Weights
from dsa_jax.checkpoints.hf.write_config import choose_layout
from dsa_jax.checkpoints.open import open_checkpoint
from dsa_jax.config import Config, ConfigError
from dsa_jax.evals.checkpoint import evaluate_checkpoint
from dsa_jax.params import parameter_paths
from pallas_kernels.quantize import QuantizedBlocks, quantize_blocks
from tests.dsa_jax.checkpoints.hf.test_load import fp8_checkpoint
from tests.dsa_jax.checkpoints.hf.tiny import write_checkpoint
from tests.dsa_jax.model.in_blocks import in_fp8, meaning
from tests.dsa_jax.model.small import forward, small_config

FIXTURE = Path("tests/fixtures/hf/deepseek_v32_fp8")  # 144 channels: blocks of 128 and of 16


def tensors(directory):
    with Weights(Path(directory)) as weights:
        return {name: weights.read(name) for name in weights.tensors}


def bits(value):
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def blocks_of(params):
    """Every kernel in fp8 blocks by path."""
    paths = parameter_paths(params)
    return {
        path: QuantizedBlocks(leaf, paths[path.removesuffix("kernel") + "block_scales"])
        for path, leaf in paths.items()
        if leaf.dtype == jnp.float8_e4m3fn
    }


@pytest.fixture(scope="module")
def kept():
    return load_pretrained(FIXTURE, dtype="float32", weight_format="fp8_blocks")


def test_a_checkpoint_in_fp8_gives_the_same_logits_kept_and_widened(kept):
    widened = load_pretrained(FIXTURE, dtype="float32")
    plain = parameter_paths(widened.params)
    blocks = blocks_of(kept.params)
    assert len(blocks) == 10 + 13 and kept.config.weight_format == "fp8_blocks"  # a dense layer and one with experts
    for path, kernel in blocks.items():
        np.testing.assert_array_equal(meaning(kernel), plain[path], err_msg=path)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 20)), jnp.int32)
    logits = [forward(each.model, each.params, ids, attention="sparse").logits for each in (kept, widened)]
    np.testing.assert_allclose(*logits, rtol=1e-5, atol=1e-5)
    assert float(jnp.std(logits[0])) > 0.1


def test_saving_writes_every_bit_back(kept, tmp_path):
    save_pretrained(tmp_path / "ours", kept.config, kept.params, shard_bytes=200_000)
    theirs, ours = tensors(FIXTURE), tensors(tmp_path / "ours")
    extra = {name for name in theirs if name.startswith("model.layers.2.")}  # multi-token prediction
    assert sorted(ours) == sorted(theirs.keys() - extra)
    for name, value in ours.items():
        if value.dtype == ml_dtypes.float8_e4m3fn or name.endswith("_scale_inv"):
            assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape, name
            np.testing.assert_array_equal(bits(value), bits(theirs[name]), err_msg=name)
    content = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert content["quantization_config"] == json.loads((FIXTURE / "config.json").read_text())["quantization_config"]
    again = load_pretrained(tmp_path / "ours", weight_format="fp8_blocks", dtype="float32")
    first, second = parameter_paths(kept.params), parameter_paths(again.params)
    assert list(first) == list(second)
    for path, value in first.items():
        assert value.dtype == second[path].dtype
        np.testing.assert_array_equal(bits(value), bits(second[path]), err_msg=path)


def test_plain_weights_are_quantised_as_they_are_read(tmp_path, monkeypatch):
    """In parts of 128 rows; scales are powers of two, as V3.2's are, and the written config says so."""
    monkeypatch.setattr(plan_module, "_PART_BYTES", 1000)
    _, stored = fp8_checkpoint(tmp_path / "fp8", (128, 128), [128, 128])
    plain = {name: value for name, value in tensors(tmp_path / "fp8").items() if not name.endswith("_scale_inv")}
    plain |= {name: value.astype(ml_dtypes.bfloat16) for name, value in stored.items()}
    content = json.loads((tmp_path / "fp8" / "config.json").read_text())
    del content["quantization_config"]
    source = write_checkpoint(tmp_path / "plain", content, plain)
    loaded = load_pretrained(source, weight_format="fp8_blocks")
    found = blocks_of(loaded.params)
    assert loaded.config.param_dtype == loaded.config.dtype == "bfloat16" and len(found) == 7
    for ours, theirs in {"attention/wq": "self_attn.q_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj"}.items():
        expected = quantize_blocks(jnp.asarray(plain[f"model.layers.0.{theirs}.weight"]).T)
        for ours_part, part in zip(found[f"dense_layers/{ours}/kernel"], expected, strict=True):
            np.testing.assert_array_equal(bits(ours_part[0]), bits(part))
    to_hf(source, tmp_path / "out", weight_format="fp8_blocks")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["scale_fmt"] == "ue8m0" and written["weight_block_size"] == [128, 128]
    again = blocks_of(open_checkpoint(tmp_path / "out", weight_format="fp8_blocks").params)
    for path, kernel in found.items():
        np.testing.assert_array_equal(bits(kernel.values), bits(again[path].values), err_msg=path)
        np.testing.assert_array_equal(kernel.scales, again[path].scales, err_msg=path)


def test_blocks_of_another_size_cannot_stay(tmp_path):
    directory, _ = fp8_checkpoint(tmp_path, (64, 32), [64, 32])
    with pytest.raises(CheckpointError, match="has scales per block of 64 x 32; weight_format fp8_blocks keeps blocks of 128"):
        load_pretrained(directory, weight_format="fp8_blocks")
    with pytest.raises(ConfigError, match=r"model\.weight_format is 'fp8'; expected"):
        load_pretrained(directory, weight_format="fp8")


@pytest.mark.parametrize("width", [256, 200])
def test_fused_experts_part_between_blocks(width, tmp_path):
    rng = np.random.default_rng(0)
    value = rng.integers(0, 120, (2, 2 * width, 130), np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = rng.standard_normal((2, -(-2 * width // 128), 2)).astype(np.float32)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    both = {name: value, f"{name}_scale_inv": scales}
    (tmp_path / "config.json").write_text("{}")
    write = [TensorToWrite(key, array.dtype, array.shape, lambda array=array: array) for key, array in both.items()]
    write_file(tmp_path / "model.safetensors", write, {})
    up = Source(name, (0, 1), True, (1,), slice(width, 2 * width))
    with Weights(tmp_path) as weights:
        if width % 128:
            with pytest.raises(CheckpointError, match="the second begins at row 200, inside a block"):
                check_blocks([up], weights, (128, 128))
            return
        check_blocks([up], weights, (128, 128))
        (part,) = read_blocks(up, weights)
    np.testing.assert_array_equal(bits(part.values), bits(value[1, width:]))
    np.testing.assert_array_equal(part.scales, scales[1, 2:])
    assert (part.rows, part.block_rows) == (slice(0, 256), slice(0, 2))


def test_a_model_of_no_family_says_how_it_is_stored_in_one_place():
    config = small_config("gqa", weight_format="fp8_blocks")
    config.attention.rope_layout = "interleaved"
    layout = choose_layout(config)
    assert layout.model_type == "dsa_jax" and layout.content["quantization_config"]["quant_method"] == "fp8"
    assert layout.content["dsa_jax"]["model"]["weight_format"] == "plain"


def test_evaluation_of_weights_kept_in_fp8(tmp_path):
    """The parity table of the command, the same for kept and widened weights."""
    _, params = in_fp8("gqa", vocab_size=640)
    save_pretrained(tmp_path, small_config("gqa", vocab_size=640, weight_format="fp8_blocks"), params)
    config = Config(name="evaluation")
    config.eval.rows, config.eval.recall_sequences = ("dense",), 0
    config.eval.text_sequences, config.eval.batch_size = 2, 2
    config.eval.text_len = config.eval.recall_len = 16
    tables = []
    for weight_format in ("plain", "fp8_blocks"):
        config.model.weight_format = weight_format
        _, table = evaluate_checkpoint(tmp_path, config)
        tables.append(table.rows)
    assert tables[0] == tables[1]


def test_a_run_has_no_fp8_weights(tmp_path):
    with pytest.raises(ConfigError, match="is no Hugging Face directory; only these load with weight_format 'fp8_blocks'"):
        open_checkpoint(tmp_path, weight_format="fp8_blocks")
