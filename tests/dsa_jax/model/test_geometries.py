"""The configs of real models build abstractly, with the published parameter counts."""

import importlib

import pytest

from dsa_jax.model import abstract_params, build_model, layer_stacks
from dsa_jax.params import is_block_scales_path, is_indexer_path, is_score_bias_path, parameter_paths


def abstract_parameters(config):
    return parameter_paths(abstract_params(build_model(config)))


def total(paths, rule=lambda path: True):
    return sum(leaf.size for path, leaf in paths.items() if rule(path) and not is_block_scales_path(path))


# Per layer: q_input * heads * dim + hidden * dim + 2 * dim + hidden * heads.
INDEXERS = {
    "deepseek_v32": 61 * (1536 * 8192 + 7168 * 128 + 256 + 7168 * 64),
    "deepseek_v2_lite": 27 * (2048 * 2048 + 2048 * 128 + 256 + 2048 * 16),
    "qwen3_0_6b": 28 * (1024 * 2048 + 1024 * 128 + 256 + 1024 * 16),
    "llama3_8b": 32 * (4096 * 4096 + 4096 * 128 + 256 + 4096 * 32),
    "glm5": 78 * (2048 * 4096 + 6144 * 128 + 256 + 6144 * 32),
}

# The published total of the released model, without indexers and multi-token prediction; exact where the publisher is.
PUBLISHED = {
    "deepseek_v32": 671_026_419_200,
    "deepseek_v2_lite": 15_706_484_224,
    "qwen3_0_6b": 596_049_920,
    "llama3_8b": 8_030_261_248,
}


@pytest.mark.parametrize("name", list(INDEXERS))
def test_parameter_counts(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.validate()
    assert config.name == name
    paths = abstract_parameters(config.model)
    assert total(paths, is_indexer_path) == INDEXERS[name]
    if name == "glm5":
        assert round(total(paths) / 1e9) == 744
    else:
        assert total(paths) - INDEXERS[name] == PUBLISHED[name]
    config.model.attention.indexer.enabled, config.model.attention.mode = False, "dense"
    without = abstract_parameters(config.model)
    assert without == {path: leaf for path, leaf in paths.items() if not is_indexer_path(path)}


def test_deepseek_v32_has_the_published_shapes():
    config = importlib.import_module("configs.deepseek_v32").get_config()
    shapes = {path: leaf.shape for path, leaf in abstract_parameters(config.model).items()}
    assert shapes["embed/embedding"] == (129280, 7168) and shapes["lm_head/kernel"] == (7168, 129280)
    expected = {
        "attention/wq_a/kernel": (7168, 1536),
        "attention/q_norm/scale": (1536,),
        "attention/wq_b/kernel": (1536, 24576),
        "attention/wkv_a/kernel": (7168, 576),
        "attention/kv_norm/scale": (512,),
        "attention/wkv_b/kernel": (512, 32768),
        "attention/wo/kernel": (16384, 7168),
        "attention/indexer/wq_b/kernel": (1536, 8192),
        "attention/indexer/wk/kernel": (7168, 128),
        "attention/indexer/k_norm/scale": (128,),
        "attention/indexer/k_norm/bias": (128,),
        "attention/indexer/weights_proj/kernel": (7168, 64),
        "attention_norm/scale": (7168,),
        "mlp_norm/scale": (7168,),
    }
    dense = expected | {f"mlp/{name}/kernel": (7168, 18432) for name in ("gate", "up")} | {"mlp/down/kernel": (18432, 7168)}
    moe = expected | {"mlp/router/kernel": (7168, 256), "mlp/router/score_bias": (256,)}
    for name, shape in (("gate", (7168, 2048)), ("up", (7168, 2048)), ("down", (2048, 7168))):
        moe |= {f"mlp/experts/{name}/kernel": (256, *shape), f"mlp/shared/{name}/kernel": shape}
    stacks = {f"dense_layers/{path}": (3, *shape) for path, shape in dense.items()}
    stacks |= {f"moe_layers/{path}": (58, *shape) for path, shape in moe.items()}
    outside = {"embed/embedding", "lm_head/kernel", "final_norm/scale"}
    kept_wide = ("weights_proj/kernel", "router/kernel")
    in_fp8 = {path: shape for path, shape in stacks.items() if path.endswith("kernel") and not path.endswith(kept_wide)}
    for path, (*lead, rows, columns) in in_fp8.items():
        stacks[path.removesuffix("kernel") + "block_scales"] = (*lead, -(-rows // 128), -(-columns // 128))
    assert stacks["moe_layers/attention/wkv_a/block_scales"] == (58, 56, 5)  # 576 columns end in half a block
    assert {path: shape for path, shape in shapes.items() if path not in outside} == stacks
    assert sum(is_score_bias_path(path) for path in shapes) == 1


def test_stacks_of_glm_5_2_alternate_and_carry_their_first_layer():
    config = importlib.import_module("configs.glm5").get_config("5.2")
    config.validate()
    stacks = layer_stacks(config.model)
    assert [(s.name, s.first_layer, s.n_layers, s.layer.mlp, s.layer.role) for s in stacks[:4]] == [
        ("dense_layers", 0, 3, "dense", "full"),
        ("moe_layers_3", 3, 3, "moe", "shared"),
        ("moe_layers_6", 6, 1, "moe", "full"),
        ("moe_layers_7", 7, 3, "moe", "shared"),
    ]
    assert sum(s.n_layers for s in stacks) == 78
    assert sum(s.n_layers for s in stacks if s.layer.has_indexer) == 21
    with pytest.raises(ValueError, match=r"expected nothing or '5\.2'"):
        importlib.import_module("configs.glm5").get_config("5.3")
