"""How layers group into stacks, and parameters that move from one grouping to another."""

import numpy as np

from dsa_jax.model.stacks import layer_stacks, restacked
from tests.dsa_jax.model.small import small_config


def test_parameters_follow_their_layers_into_other_stacks():
    dense, sharing = (layer_stacks(small_config(kind, layer_types=("full", "shared", "shared"))) for kind in ("none", "gqa"))
    assert [stack.name for stack in dense] == ["dense_layers"]
    assert [(stack.name, stack.n_layers) for stack in sharing] == [("dense_layers_0", 1), ("dense_layers_1", 2)]
    flat = {"embed/embedding": np.zeros(2), "dense_layers/wq/kernel": np.arange(3.0)[:, None]}

    there = restacked(flat, dense, sharing)
    assert set(there) == {"embed/embedding", "dense_layers_0/wq/kernel", "dense_layers_1/wq/kernel"}
    np.testing.assert_array_equal(there["dense_layers_1/wq/kernel"], [[1.0], [2.0]])
    back = restacked(there, sharing, dense)
    assert back.keys() == flat.keys()
    np.testing.assert_array_equal(back["dense_layers/wq/kernel"], flat["dense_layers/wq/kernel"])


def test_what_only_some_layers_of_a_stack_have_is_left_out():
    dense, sharing = (layer_stacks(small_config(kind, layer_types=("full", "shared", "shared"))) for kind in ("none", "gqa"))
    flat = {"dense_layers_0/indexer/wk/kernel": np.zeros((1, 2))}
    assert restacked(flat | {"dense_layers_1/wq/kernel": np.zeros((2, 2))}, sharing, dense) == {}
