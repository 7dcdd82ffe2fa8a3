"""Loading: the config in both spellings, and every tensor in its place."""

import dataclasses
import json
import logging

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsa_jax import load_pretrained
from dsa_jax.checkpoints.hf import CheckpointError, read_model_config
from dsa_jax.config import ConfigError, IndexerConfig
from dsa_jax.model import build_model, init_params
from dsa_jax.params import is_indexer_path, parameter_paths
from tests.dsa_jax.checkpoints.hf.tiny import (
    CASES,
    EXPERTS,
    LAYERS,
    VOCAB,
    config_of,
    shapes_of,
    tensors_of,
    write_checkpoint,
)

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
    explicit = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    assert jax.tree.leaves(load_pretrained(directory, mesh=explicit).params)[0].sharding.mesh == mesh
    replicated = load_pretrained(directory, mesh=mesh).params
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(replicated))
    split = jax.make_mesh((2, 2), ("tensor", "other"), devices=jax.devices()[:4])
    params = load_pretrained(directory, mesh=split).params
    assert params["dense_layers"]["attention"]["wo"]["kernel"].sharding.spec == jax.P(None, "tensor", None)
    three = jax.make_mesh((3,), ("fsdp",), devices=jax.devices()[:3])
    with pytest.raises(ConfigError, match=r"parallel.fsdp is 3, which does not divide axis 1 of dense_layers/attention/wk"):
        load_pretrained(directory, mesh=three)
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
    shared = IndexerConfig(n_heads=2, head_dim=16, rope_dim=8, topk=5)
    layer_types = ("full", "shared", "full")
    loaded = load_pretrained(directory, indexer=shared, layer_types=layer_types, attention="sparse")
    assert loaded.config.attention.indexer.enabled
    assert loaded.config.attention.mode == "sparse"
    assert len(loaded.model.stacks) == 3


def test_an_indexer_that_is_there_already_must_be_the_one_asked_for(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("deepseek_v32"))
    theirs = read_model_config(directory).attention.indexer
    assert load_pretrained(directory, indexer=theirs).config.attention.mode == "sparse"
    same = dataclasses.replace(theirs, enabled=False, coarse_loss_weight=1.0)
    assert load_pretrained(directory, indexer=same, layer_types=("full",) * LAYERS).config.attention.indexer == theirs
    with pytest.raises(CheckpointError, match="has indexers of its own"):
        load_pretrained(directory, indexer=IndexerConfig(enabled=True))


def test_a_dtype_that_there_is_not(tmp_path):
    with pytest.raises(ConfigError, match="dtype is 'fp32'; expected 'float32' or 'bfloat16'"):
        load_pretrained(write_checkpoint(tmp_path, config_of("llama")), dtype="fp32")


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
    embedding = tensors_of(content)["model.embed_tokens.weight"]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32), "lm_head.weight": embedding}
    with caplog.at_level(logging.INFO):
        loaded = load_pretrained(write_checkpoint(tmp_path, content, tensors_of(content) | extra))
    assert "lm_head" not in loaded.params
    assert "its own copy lm_head.weight is not read" in caplog.text
    assert "not known: invented_field" in caplog.text


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
    nameless = json.dumps(word_tokenizer(VOCAB)).replace("<|endoftext|>", "<end>")
    (directory / "tokenizer.json").write_text(nameless)
    for end in (7, None):
        (directory / "config.json").write_text(json.dumps(config_of("llama") | {"eos_token_id": end}))
        tokenizer = load_pretrained(directory).tokenizer
        assert end is None or tokenizer.end_of_text_id == end
    assert tokenizer is None and "no token that ends a document" in caplog.text
    (directory / "tokenizer.json").write_text(json.dumps(word_tokenizer(VOCAB + 1)))
    named = rf"tokenizer has {VOCAB + 1} tokens, vocab_size of config.json is {VOCAB}, .* token {VOCAB}, '<\|endoftext\|>'"
    with pytest.raises(CheckpointError, match=named):
        load_pretrained(directory)


def test_a_padding_token_beyond_the_vocabulary_is_no_reason_to_refuse(tmp_path):
    directory = write_checkpoint(tmp_path, config_of("llama"))
    pad = {"id": VOCAB, "content": "[PAD]", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    (directory / "tokenizer.json").write_text(json.dumps(word_tokenizer(VOCAB) | {"added_tokens": [pad]}))
    loaded = load_pretrained(directory)
    assert loaded.tokenizer.vocab_size == VOCAB and loaded.stop_tokens == (2, 3, VOCAB - 1)


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
    from dsa_jax.checkpoints.hf.safetensors_file import DTYPES, read_header, read_tensor

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
