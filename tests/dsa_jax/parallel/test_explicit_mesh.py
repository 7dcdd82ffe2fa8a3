"""The model on a mesh with Explicit axes: it runs where nothing of it is split over them, and says what to do elsewhere."""

import jax
import numpy as np
import pytest

from dsa_jax.config import AXES
from tests.dsa_jax.model.small import built

IDS = np.arange(32, dtype=np.int32).reshape(2, 16)


@pytest.fixture(scope="module")
def model_and_params():
    return built(kind="gqa_qwen")


def mesh(sizes, names):
    return jax.set_mesh(jax.make_mesh(sizes, names, devices=jax.devices()[:2]))


def logits(model, params, ids):
    return jax.jit(lambda params, ids: model.apply({"params": params}, ids, attention="sparse").logits)(params, ids)


def put(x, spec):
    return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec))


def test_a_model_that_is_not_split_runs(model_and_params):
    model, params = model_and_params
    expected = logits(model, params, IDS)
    with mesh((2,), ("data",)):
        found = logits(model, put(params, jax.P()), put(IDS, jax.P()))
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_split_input_or_parameters_are_refused_with_a_remedy(model_and_params):
    model, params = model_and_params
    remedy = r"has Explicit axes \(data\).*expected Auto axes.*axis_types"
    with mesh((2,), ("data",)):
        with pytest.raises(ValueError, match=remedy):
            logits(model, put(params, jax.P()), put(IDS, jax.P("data")))
        layers = params["dense_layers"]
        split = params | {"dense_layers": layers | {"mlp": put(layers["mlp"], jax.P(None, "data"))}}
        with pytest.raises(ValueError, match=remedy):
            logits(model, split, put(IDS, jax.P()))
        cache = model.init_cache(2, 16)
        cache = cache._replace(pools=put(cache.pools, jax.P(None, "data")))
        with pytest.raises(ValueError, match=remedy):
            model.apply({"params": put(params, jax.P())}, IDS, np.full(2, 16), cache, method="extend")


def test_a_mesh_of_ours_must_have_auto_axes(model_and_params):
    model, params = model_and_params
    with mesh((1, 2, 1, 1, 1), AXES), pytest.raises(ValueError, match=r"Explicit axes \(context, data, expert, fsdp, tensor\)"):
        logits(model, params, IDS)
