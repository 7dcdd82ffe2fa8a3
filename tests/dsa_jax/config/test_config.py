"""What `Config.validate` refuses; a recipe is Python and may hold anything."""

import numpy as np
import pytest

from dsa_jax.config import AttentionConfig, Config, ConfigError, DataConfig, ModelConfig, from_dict


def changed(path, value):
    config = node = Config()
    *parents, name = path.split(".")
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, name, value)
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.sparse.steps", 2e0, "train.sparse.steps is 2.0; expected int."),
        ("train.warmup.steps", True, "train.warmup.steps is True; expected int."),
        ("model.attention.indexer.topk", np.int64(4), r"model.attention.indexer.topk is .*; expected int."),
        ("model.tie_embeddings", 1, "model.tie_embeddings is 1; expected bool."),
        ("eval.rows", "dense", "eval.rows is 'dense'; expected list or tuple."),
        ("model", DataConfig(), "model is DataConfig.*; expected a ModelConfig."),
        ("seed", -1, r"seed is -1; expected a whole number from 0 to 2\*\*32 - 2."),
        ("seed", 2**32 - 1, r"seed is 4294967295; expected a whole number from 0 to 2\*\*32 - 2."),
        ("train.sparse.optimizer.eps", 0.0, "train.sparse.optimizer.eps is 0.0; expected a positive number."),
        ("train.sparse.optimizer.b1", 1.0, "train.sparse.optimizer.b1 is 1; expected less"),
        ("train.sparse.optimizer.b2", 1.5, "train.sparse.optimizer.b2 is 1.5; expected a fraction"),
    ],
)
def test_a_field_that_cannot_be_is_named(path, value, message):
    with pytest.raises(ConfigError, match=message):
        changed(path, value).validate()


def test_whole_numbers_and_lists_stand_for_floats_and_tuples():
    config = changed("train.sparse.optimizer.learning_rate", 1)
    config.train.warmup.optimizer.learning_rate = np.float64(1e-3)
    config.eval.rows, config.model = ["dense"], ModelConfig()
    config.validate()


def test_a_misspelt_field_of_a_recipe_is_named():
    config = Config()
    config.train.warmup.stps = 3
    with pytest.raises(
        ConfigError, match=r"train\.warmup\.stps is set, which is no field of StageConfig\. Did you mean 'steps'"
    ):
        config.validate()


def test_settings_that_an_earlier_version_wrote_are_read_by_their_names_of_today():
    indexer = {"enabled": True, "layer_types": ["full", "shared"], "detach_input": True}
    read = from_dict(AttentionConfig, {"kind": "gqa", "nsa": {"enabled": True, "window": 7}, "indexer": indexer})
    assert (read.kind, read.nsa.window, read.layer_types) == ("nsa", 7, ("full", "shared"))
    with pytest.raises(ConfigError, match="detach_input is False, which is no setting any more"):
        from_dict(AttentionConfig, {"indexer": {"detach_input": False}})
