"""Indexers attached to a checkpoint: their initial scale, and layers that get none."""

import ml_dtypes
import numpy as np
import pytest

from configs import retrofit_hf
from dsa_jax import load_pretrained, save_pretrained
from dsa_jax.checkpoints.from_hf import checkpoint_params, keep_source, load_for_evaluation, resolve_checkpoint
from dsa_jax.config import AttentionConfig, Config, ConfigError, DataConfig, IndexerConfig
from dsa_jax.params import is_indexer_path, parameter_paths
from tests.dsa_jax.checkpoints.hf.tiny import HIDDEN, LAYERS, config_of, tensors_of, write_checkpoint

GAINS = (0.1, 1.0, 4.0)


def source(directory, case):
    content = config_of(case)
    tensors = tensors_of(content)
    for layer, gain in enumerate(GAINS):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.linspace(0.5, 1.5, HIDDEN, dtype=np.float32) * gain
    return write_checkpoint(directory, content, tensors)


def recipe(directory, **init):
    config = Config(data=DataConfig(recall_fraction=0.0))
    config.data.text.tokenizer = "bytes"
    config.init.hf_dir = str(directory)
    for name, value in init.items():
        setattr(config.init, name, value)
    config.model.attention.indexer = IndexerConfig(enabled=True, n_heads=2, head_dim=16, rope_dim=8, topk=5)
    return resolve_checkpoint(config)


def indexers(config):
    """Indexer parameters by what follows `indexer/`, all layers stacked."""
    stacks = {}
    for path, leaf in parameter_paths(checkpoint_params(config)).items():
        if is_indexer_path(path):
            stacks.setdefault(path.split("indexer/")[1], []).append(np.asarray(leaf))
    return {name: np.concatenate(leaves) for name, leaves in stacks.items()}


@pytest.mark.parametrize(("case", "scaled"), [("llama", ("weights_proj", "wq_b")), ("deepseek_v2", ("weights_proj",))])
def test_a_new_indexer_is_divided_by_the_gain_of_its_layer(tmp_path, case, scaled):
    directory = source(tmp_path, case)
    with_gain, plain = indexers(recipe(directory)), indexers(recipe(directory, scale_new_indexers=False))
    rms = np.array(GAINS)[:, None, None] * np.sqrt(np.mean(np.linspace(0.5, 1.5, HIDDEN) ** 2))
    assert len(plain["wk/kernel"]) == LAYERS == len(GAINS)
    for name, value in plain.items():
        divided = name.split("/")[0] in scaled
        np.testing.assert_allclose(with_gain[name], value / rms if divided else value, rtol=1e-5, err_msg=name)


def test_an_indexer_that_the_checkpoint_has_is_left_as_it_is(tmp_path):
    directory = source(tmp_path, "deepseek_v32")
    loaded = parameter_paths(load_pretrained(directory).params)
    for path, leaf in parameter_paths(checkpoint_params(recipe(directory))).items():
        np.testing.assert_array_equal(leaf, loaded[path], err_msg=path)


def test_first_layers_stay_dense_through_an_export(tmp_path):
    config = recipe(source(tmp_path / "source", "llama"), dense_layers=1)
    assert config.model.attention.layer_types == ("dense", "full", "full")
    params = checkpoint_params(config)
    assert sum(len(leaf) for path, leaf in parameter_paths(params).items() if path.endswith("indexer/wk/kernel")) == LAYERS - 1
    config.model.attention.mode = "sparse"
    save_pretrained(tmp_path / "out", config.model, params)
    again = load_pretrained(tmp_path / "out")
    assert again.config.attention.layer_types == ("dense", "full", "full")
    ids = np.arange(24, dtype=np.int32)[None] % 40
    output = again.model.apply({"params": again.params}, ids, return_coverage=True, attention="sparse")
    selected = (1 + 2 + 3 + 4 + 20 * 5) / 24
    np.testing.assert_allclose(output.keys_per_query, [12.5, selected, selected], rtol=1e-6)
    assert output.coverage[0] == pytest.approx(1.0) and max(output.coverage[1:]) < 0.999


@pytest.mark.parametrize(
    ("case", "init", "message"),
    [
        ("llama", {"dense_layers": 3}, "expected fewer than the 3 layers"),
        ("deepseek_v32", {"dense_layers": 1}, "a checkpoint without indexers"),
    ],
)
def test_dense_layers_that_cannot_be_are_refused(tmp_path, case, init, message):
    with pytest.raises(ConfigError, match=message):
        recipe(source(tmp_path, case), **init)
    config = Config()
    config.init.dense_layers = 2
    with pytest.raises(ConfigError, match=r"init.dense_layers is 2 without init.hf_dir"):
        config.validate()


def of_recipe(directory, *, platform, **model):
    config = retrofit_hf.get_config()
    config.init.hf_dir, config.data.text.tokenizer = str(directory), "bytes"
    config.train.sparse.seq_len = 32
    for name, value in model.items():
        setattr(config.model, name, value)
    return resolve_checkpoint(config, platform=platform)


@pytest.mark.parametrize(
    ("stated", "platform", "asked", "computed"),
    [
        ("bfloat16", "gpu", "checkpoint", "bfloat16"),
        ("bfloat16", "cpu", "checkpoint", "float32"),
        ("bfloat16", None, "checkpoint", "float32"),  # where the tests run
        ("float32", "gpu", "checkpoint", "float32"),
        ("float16", "gpu", "checkpoint", "float32"),  # which float16 is read as
        ("bfloat16", "gpu", "float32", "float32"),
        ("float32", "gpu", "bfloat16", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16", "bfloat16"),
    ],
)
def test_matmuls_follow_the_checkpoint_unless_told(tmp_path, stated, platform, asked, computed):
    content = config_of("qwen3") | {"dtype": stated}
    directory = write_checkpoint(tmp_path, content, tensors_of(content))
    config = of_recipe(directory, platform=platform, dtype=asked)
    assert (config.model.param_dtype, config.model.dtype) == ("float32", computed)


def test_an_evaluation_computes_in_the_dtype_that_is_asked_for(tmp_path):
    config = recipe(source(tmp_path, "llama"))
    config.model.dtype = "bfloat16"
    found, model, params = load_for_evaluation(config)
    assert found.model.dtype == model.config.dtype == "bfloat16" and found.model.param_dtype == "float32"
    assert all(leaf.dtype == np.float32 for leaf in parameter_paths(params).values())


@pytest.mark.parametrize("asked", [{"dtype": "checkpoint"}, {"n_heads": 0}])
def test_what_a_checkpoint_decides_needs_one(asked):
    config = Config()
    config.model.attention.indexer = IndexerConfig(enabled=True, n_heads=asked.get("n_heads", 4))
    config.model.dtype = asked.get("dtype", "float32")
    with pytest.raises(ConfigError, match=r"without a checkpoint.*--config\.init\.hf_dir=DIR"):
        config.validate()


def test_index_heads_are_sized_by_the_model_unless_told(tmp_path):
    directory = source(tmp_path, "qwen3")
    assert of_recipe(directory, platform="gpu").model.attention.indexer.n_heads == 1  # topk is beyond these rows
    told = IndexerConfig(enabled=True, n_heads=7, head_dim=16, rope_dim=8, topk=5)
    assert of_recipe(directory, platform="gpu", attention=AttentionConfig(indexer=told)).model.attention.indexer == told


def test_a_copy_of_the_source_states_the_dtype_of_weights_that_may_go(tmp_path):
    content = config_of("qwen3")
    content.pop("dtype", None), content.pop("torch_dtype", None)
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors_of(content).items()}
    directory = write_checkpoint(tmp_path / "source", content, tensors)
    keep_source(str(directory), tmp_path / "kept")
    before, after = (of_recipe(path, platform="gpu").model.dtype for path in (directory, tmp_path / "kept"))
    assert before == after == "bfloat16"
