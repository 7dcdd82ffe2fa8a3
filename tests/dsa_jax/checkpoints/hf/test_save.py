"""Saving: the same bits on the way back, the layout others read, and what fits the config."""

import dataclasses
import json
import logging

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsa_jax import build_model, load_pretrained, save_pretrained
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.write_config import choose_layout
from dsa_jax.config import AttentionConfig, IndexerConfig, ModelConfig, MoEConfig, RopeConfig
from dsa_jax.model import abstract_params
from dsa_jax.params import nested_parameters, parameter_paths
from tests.dsa_jax.checkpoints.hf.tiny import CASES, assert_same, config_of, read_tensors, tensors_of, write_checkpoint

INDEXER = IndexerConfig(enabled=True, n_heads=2, head_dim=16, rope_dim=8, topk=5)


def config_json(directory):
    return json.loads((directory / "config.json").read_text())


def drawn(config, seed=0):
    """Parameters of a config, drawn with numpy."""
    rng = np.random.default_rng(seed)
    model = build_model(config)
    shapes = parameter_paths(abstract_params(model))
    return nested_parameters({path: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for path, leaf in shapes.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_load_then_save_gives_the_tensors_back(case, dtype, tmp_path):
    content = config_of(case, dtype=dtype)
    tensors = tensors_of(content)
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", content, tensors))
    save_pretrained(tmp_path / "ours", loaded.config, loaded.params, shard_bytes=20_000)
    written = read_tensors(tmp_path / "ours")
    assert sorted(written) == sorted(tensors)
    for name, value in tensors.items():
        assert written[name].dtype == value.dtype, name
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    assert config_json(tmp_path / "ours")["model_type"] == content["model_type"]
    again = load_pretrained(tmp_path / "ours")
    assert again.config == loaded.config
    assert_same(again.params, loaded.params)


def test_shards_are_full_and_indexed(tmp_path):
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("deepseek_v3")))
    save_pretrained(tmp_path / "ours", loaded.config, loaded.params, shard_bytes=20_000)
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    sizes = {}
    for name, value in read_tensors(tmp_path / "ours").items():
        file = index["weight_map"][name]
        sizes[file] = sizes.get(file, 0) + value.nbytes
    assert sorted(sizes) == files
    assert max(sizes.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(sizes.values())
    header = (tmp_path / "ours" / files[0]).read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"format": "pt"}
    with pytest.raises(ValueError, match="shard_bytes is 0"):
        save_pretrained(tmp_path / "ours", loaded.config, loaded.params, shard_bytes=0)


def test_saving_twice_writes_the_same_bytes(tmp_path):
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("qwen3_moe")))
    for name in ("first", "second"):
        save_pretrained(tmp_path / name, loaded.config, loaded.params)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_retrofitted_deepseek_v3_becomes_a_deepseek_v32(tmp_path):
    directory = write_checkpoint(tmp_path / "dense", config_of("deepseek_v3", dtype="bfloat16"))
    loaded = load_pretrained(directory, indexer=INDEXER, attention="sparse")
    save_pretrained(tmp_path / "sparse", loaded.config, loaded.params)
    content = config_json(tmp_path / "sparse")
    assert content["model_type"] == "deepseek_v32"
    assert content["architectures"] == ["DeepseekV32ForCausalLM"]
    assert (content["index_n_heads"], content["index_head_dim"], content["index_topk"]) == (2, 16, 5)
    assert content["rope_theta"] == content["rope_parameters"]["rope_theta"] == 10000.0
    assert content["rope_scaling"]["type"] == content["rope_parameters"]["rope_type"] == "yarn"
    assert content["torch_dtype"] == content["dtype"] == "bfloat16"
    assert content["first_k_dense_replace"] == 1
    assert "dsa_jax" not in content
    written = read_tensors(tmp_path / "sparse")
    prefix = "model.layers.2"
    assert written[f"{prefix}.self_attn.indexer.wq_b.weight"].dtype == ml_dtypes.bfloat16
    assert written[f"{prefix}.self_attn.indexer.wq_b.weight"].shape == (32, 20)
    assert written[f"{prefix}.self_attn.indexer.weights_proj.weight"].dtype == ml_dtypes.bfloat16
    for name in ("self_attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.bias", "mlp.gate.e_score_correction_bias"):
        assert written[f"{prefix}.{name}"].dtype == np.float32
    again = load_pretrained(tmp_path / "sparse")
    assert again.config.attention.mode == "sparse"
    assert_same(again.params, loaded.params)


@pytest.mark.parametrize(
    ("case", "changes", "model_type"),
    [
        ("deepseek_v2", {}, "deepseek_v2"),  # its router is a softmax
        ("deepseek_v2_lite", {}, "deepseek_v2"),
        ("deepseek_v3", {}, "deepseek_v32"),
        ("deepseek_v3", {"rope_dim": 4}, "deepseek_v3"),  # deepseek_v32 rotates as many channels as the attention
        ("deepseek_v3", {"rope_layout": "interleaved"}, "glm_moe_dsa"),
        ("deepseek_v3", {"rope_layout": "interleaved", "layer_types": ("full", "full", "shared")}, "glm_moe_dsa"),
        ("deepseek_v3", {"layer_types": ("full", "shared", "full")}, "glm_moe_dsa"),
        ("glm4_moe_lite", {}, "glm4_moe_lite"),  # half-split latent rotation, which deepseek_v32 never has
        ("llama", {}, "llama"),
        ("qwen3", {"layer_types": ("full", "shared", "full")}, "qwen3"),
        ("qwen3_moe", {}, "qwen3_moe"),
    ],
)
def test_where_a_retrofit_goes(case, changes, model_type, tmp_path, caplog):
    changes = dict(changes)
    layer_types = changes.pop("layer_types", ())
    directory, indexer = write_checkpoint(tmp_path / "dense", config_of(case)), dataclasses.replace(INDEXER, **changes)
    loaded = load_pretrained(directory, indexer=indexer, layer_types=layer_types, attention="sparse")
    with caplog.at_level(logging.INFO):
        save_pretrained(tmp_path / "sparse", loaded.config, loaded.params)
    content = config_json(tmp_path / "sparse")
    assert content["model_type"] == model_type
    assert content["index_topk"] == 5
    assert ("run it dense" in caplog.text) == (model_type not in ("deepseek_v32", "glm_moe_dsa"))
    assert "only dsa-jax honours" not in caplog.text
    assert any(".self_attn.indexer.wq_b.weight" in name for name in read_tensors(tmp_path / "sparse"))
    again = load_pretrained(tmp_path / "sparse")
    assert again.config.attention == loaded.config.attention
    assert_same(again.params, loaded.params)


def test_why_a_family_that_others_read_cannot_hold_the_model(tmp_path, caplog):
    indexer = dataclasses.replace(INDEXER, rope_dim=4)
    loaded = load_pretrained(
        write_checkpoint(tmp_path / "dense", config_of("deepseek_v3")), indexer=indexer, attention="sparse"
    )
    assert loaded.config.attention.qk_rope_head_dim != 4
    save_pretrained(tmp_path / "sparse", loaded.config, loaded.params)
    assert "deepseek_v32 cannot say attention.indexer.rope_dim = 4" in caplog.text


def test_a_shared_indexer_that_rotates_halves_is_written_interleaved(tmp_path):
    indexer = dataclasses.replace(INDEXER, n_heads=2, head_dim=10, rope_dim=8)
    directory = write_checkpoint(tmp_path / "dense", config_of("deepseek_v3"))
    loaded = load_pretrained(directory, indexer=indexer, layer_types=("full", "full", "shared"))
    leaves = parameter_paths(loaded.params)
    save_pretrained(tmp_path / "sparse", loaded.config, loaded.params)
    assert config_json(tmp_path / "sparse")["indexer_rope_interleave"] is True
    written = read_tensors(tmp_path / "sparse")
    order = [0, 4, 1, 5, 2, 6, 3, 7, 8, 9]
    prefix, stack = "model.layers.0.self_attn.indexer", next(path.split("/")[0] for path in leaves if "/indexer/" in path)
    wk, wq_b, scale = (
        np.asarray(leaves[f"{stack}/attention/indexer/{name}"][0]) for name in ("wk/kernel", "wq_b/kernel", "k_norm/scale")
    )
    np.testing.assert_array_equal(written[f"{prefix}.wk.weight"], wk.T[order])
    np.testing.assert_array_equal(written[f"{prefix}.wq_b.weight"], wq_b.T.reshape(2, 10, -1)[:, order].reshape(20, -1))
    np.testing.assert_array_equal(written[f"{prefix}.k_norm.weight"], scale[order])


def test_what_only_we_read_is_said_and_survives(tmp_path, caplog):
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("deepseek_v32")), attention="dense")
    loaded.config.logits_scale = 0.125
    loaded.config.attention.latent_norm_eps = 1e-5
    loaded.config.attention.indexer.hadamard = True
    with caplog.at_level(logging.WARNING):
        save_pretrained(tmp_path / "ours", loaded.config, loaded.params)
    assert "only dsa-jax honours" in caplog.text
    own = config_json(tmp_path / "ours")["dsa_jax"]
    assert own == {
        "attention.mode": "dense",
        "attention.latent_norm_eps": 1e-5,
        "attention.indexer.hadamard": True,
        "logits_scale": 0.125,
    }
    assert load_pretrained(tmp_path / "ours").config == loaded.config


def test_the_budget_of_a_window_survives(tmp_path):
    config = ModelConfig(
        vocab_size=48, hidden_dim=32, mlp_dim=40, n_layers=2, attention=gqa(mode="window", indexer=IndexerConfig(topk=4))
    )
    save_pretrained(tmp_path, config, drawn(config))
    assert config_json(tmp_path)["model_type"] == "llama"
    indexer = load_pretrained(tmp_path).config.attention.indexer
    assert (indexer.enabled, indexer.topk) == (False, 4)


@pytest.mark.parametrize("mode", ["sparse", "coarse_to_fine"])
def test_settings_of_block_selection_leave_the_family_alone(mode, tmp_path, caplog):
    blocks = {"coarse_block_size": 4, "coarse_blocks": 2, "coarse_pooling": "salient"}
    loaded = load_pretrained(
        write_checkpoint(tmp_path / "dense", config_of("deepseek_v3")),
        indexer=dataclasses.replace(INDEXER, coarse_loss_weight=1.0, **blocks),
        attention=mode,
    )
    with caplog.at_level(logging.WARNING):
        save_pretrained(tmp_path / "sparse", loaded.config, loaded.params)
    assert config_json(tmp_path / "sparse")["model_type"] == "deepseek_v32"
    assert ("coarse_blocks = 2" in caplog.text) == (mode == "coarse_to_fine")
    again = load_pretrained(tmp_path / "sparse").config.attention.indexer
    assert {name: getattr(again, name) for name in blocks} == blocks and again.coarse_loss_weight == 0.0


def mla(**fields):
    sizes = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "rope_layout": "interleaved"}
    return AttentionConfig(kind="mla", n_heads=4, **(sizes | fields))


def gqa(**fields):
    return AttentionConfig(**({"n_heads": 4, "n_kv_heads": 2, "head_dim": 8} | fields))


MOE = {"n_routed_experts": 4, "n_experts_per_token": 2, "expert_dim": 16, "n_shared_experts": 1}
OWN_MODELS = {
    "llama": ({"attention": gqa()}, "llama"),
    "qwen3": ({"attention": gqa(qk_norm=True)}, "qwen3"),
    "qwen3 with indexer": ({"attention": gqa(qk_norm=True, mode="sparse", indexer=INDEXER)}, "qwen3"),
    "gqa, biases of q, k, v": ({"attention": gqa(use_bias=True)}, "dsa_jax"),
    "gqa, interleaved": ({"attention": gqa(rope_layout="interleaved")}, "dsa_jax"),
    "gqa, sigmoid experts": ({"attention": gqa(qk_norm=True), "moe": MoEConfig(**MOE)}, "dsa_jax"),
    "dense mla": ({"attention": mla()}, "deepseek_v3"),
    "mla": ({"attention": mla(q_lora_rank=20, mode="sparse", indexer=INDEXER)}, "deepseek_v32"),
    "mla, no query latent": ({"attention": mla(mode="sparse", indexer=INDEXER)}, "deepseek_v3"),
    "mla, experts": (
        {"attention": mla(q_lora_rank=20, mode="sparse", indexer=INDEXER), "moe": MoEConfig(**MOE, n_dense_layers=1)},
        "deepseek_v32",
    ),
    "mla, softmax experts": (
        {
            "attention": mla(q_lora_rank=20, mode="sparse", indexer=INDEXER),
            "moe": MoEConfig(**MOE, scoring="softmax", use_score_bias=False, normalize_weights=False),
        },
        "deepseek_v2",
    ),
    "mla, half split, softmax": (
        {"attention": mla(rope_layout="half_split"), "moe": MoEConfig(**MOE, scoring="softmax", use_score_bias=False)},
        "dsa_jax",
    ),
    "mscale without mscale_all_dim": (
        {"attention": gqa(rope=RopeConfig(scaling="yarn", factor=4.0, original_max_positions=16, mscale=2.0))},
        "llama",
    ),
}


@pytest.mark.parametrize("name", OWN_MODELS)
def test_models_trained_here(name, tmp_path):
    fields, model_type = OWN_MODELS[name]
    config = ModelConfig(vocab_size=48, hidden_dim=32, mlp_dim=40, n_layers=2, **fields)
    params = drawn(config)
    save_pretrained(tmp_path / "ours", config, params)
    assert config_json(tmp_path / "ours")["model_type"] == model_type
    again = load_pretrained(tmp_path / "ours")
    assert_same(again.params, params)
    x = jnp.arange(12, dtype=jnp.int32)[None] % 48
    if name in ("mscale without mscale_all_dim", "gqa, interleaved", "mla, softmax experts"):
        before = build_model(config).apply({"params": params}, x).logits
        np.testing.assert_array_equal(again.model.apply({"params": again.params}, x).logits, before)


def test_a_sigmoid_router_without_a_bias_gets_one_of_zeros(tmp_path):
    config = ModelConfig(
        vocab_size=48, hidden_dim=32, mlp_dim=40, n_layers=2, attention=mla(), moe=MoEConfig(**MOE, use_score_bias=False)
    )
    params = drawn(config)
    save_pretrained(tmp_path / "ours", config, params)
    again = parameter_paths(load_pretrained(tmp_path / "ours").params)
    np.testing.assert_array_equal(again["moe_layers/mlp/router/score_bias"], np.zeros((2, 4)))
    for path, value in parameter_paths(params).items():
        np.testing.assert_array_equal(again[path], value)


def test_norms_are_narrowed_only_where_that_loses_nothing(tmp_path, caplog):
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("llama", dtype="bfloat16")))
    trained = parameter_paths(loaded.params)
    trained["final_norm/scale"] = trained["final_norm/scale"] + 1e-4
    with caplog.at_level(logging.INFO):
        save_pretrained(tmp_path / "ours", loaded.config, nested_parameters(trained))
    assert "kept in float32, since bfloat16 would round them: final_norm/scale" in caplog.text
    written = read_tensors(tmp_path / "ours")
    assert written["model.norm.weight"].dtype == np.float32
    assert written["model.layers.0.input_layernorm.weight"].dtype == ml_dtypes.bfloat16
    assert_same(load_pretrained(tmp_path / "ours").params, nested_parameters(trained))


def test_parameters_must_fit_the_config(tmp_path):
    loaded = load_pretrained(write_checkpoint(tmp_path / "theirs", config_of("llama")))
    paths = parameter_paths(loaded.params)

    def refused(changed, match):
        with pytest.raises(CheckpointError, match=match):
            save_pretrained(tmp_path / "ours", loaded.config, nested_parameters(changed))
        assert not (tmp_path / "ours").exists()

    refused({path: value for path, value in paths.items() if path != "lm_head/kernel"}, "lm_head/kernel is missing")
    refused(paths | {"extra/kernel": jnp.zeros(1)}, "extra/kernel belongs to no part")
    refused(paths | {"lm_head/kernel": jnp.zeros((2, 3))}, r"float32 \[2, 3\], expected float32 \[32, 48\]")
    half = paths["lm_head/kernel"].astype(jnp.bfloat16)
    refused(paths | {"lm_head/kernel": half}, r"bfloat16 \[32, 48\], expected float32")


def test_every_family_case_keeps_its_own_layout(tmp_path):
    for case in CASES:
        loaded = load_pretrained(write_checkpoint(tmp_path / case, config_of(case)))
        layout = choose_layout(loaded.config)
        assert (layout.model_type, layout.extra) == (config_of(case)["model_type"], {}), case
