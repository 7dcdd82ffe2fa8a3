"""Paths and nested dicts turn into each other."""

import numpy as np
import pytest

from dsa_jax.params import count_parameters, is_indexer_path, is_score_bias_path, nested_parameters, parameter_paths

PARAMS = {"a": {"indexer": {"wk": {"kernel": np.ones((2, 3))}}, "b": np.ones(4)}, "c": np.ones(())}


def test_round_trip():
    paths = parameter_paths(PARAMS)
    assert list(paths) == ["a/indexer/wk/kernel", "a/b", "c"]
    assert nested_parameters(paths) == PARAMS
    assert count_parameters(PARAMS) == 11


def test_what_belongs_to_an_indexer():
    assert is_indexer_path("moe_layers/attention/indexer/wq_b/kernel")
    assert not is_indexer_path("moe_layers/attention/wq_b/kernel")
    assert is_score_bias_path("moe_layers/mlp/router/score_bias") and not is_score_bias_path("a/bias")


@pytest.mark.parametrize("paths", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_a_parameter_that_is_also_a_folder_is_refused(paths):
    with pytest.raises(ValueError, match="expected distinct paths"):
        nested_parameters(paths)
