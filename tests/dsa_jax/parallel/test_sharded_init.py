"""Fresh parameters on a mesh: each device draws its own part, with the bits of one device."""

import jax
import numpy as np

from dsa_jax.model import build_model, init_params
from dsa_jax.model.build import _init_params
from dsa_jax.parallel.placement import placement_on
from dsa_jax.params import is_indexer_path, parameter_paths, split_parameters
from tests.dsa_jax.parallel.meshes import eight_way_config, mesh


def test_parameters_are_drawn_where_they_stay():
    model = build_model(eight_way_config("mla", moe=True))
    expected = parameter_paths(init_params(model, jax.random.key(7)))
    with jax.set_mesh(mesh("fsdp2_ep2_tp2")):
        found = parameter_paths(init_params(model, jax.random.key(7)))
        indexers = jax.jit(lambda key: split_parameters(init_params(model, key), is_indexer_path)[0])(jax.random.key(7))
        where = placement_on(jax.sharding.get_mesh())
        program = _init_params.lower(model, jax.random.key(7)).compile().as_text()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
        assert found[path].sharding.is_equivalent_to(where(path), value.ndim), path
    for path, value in parameter_paths(indexers).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
        assert value.sharding.is_equivalent_to(where(path), value.ndim), path
    experts = expected["moe_layers/mlp/experts/gate/kernel"].shape
    assert f"[{','.join(map(str, experts))}]" not in program
