"""The Linen modules work from NNX."""

import jax
import numpy as np
from flax import nnx

from dsa_jax.model import build_model
from tests.dsa_jax.model.small import built, forward, random_ids, small_config


def test_the_model_runs_as_an_nnx_module():
    ids = random_ids()
    _, params = built("gqa", n_layers=1)
    bridged = nnx.bridge.ToNNX(build_model(small_config("gqa", n_layers=1)), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(bridged, ids, attention="dense")
    state = nnx.state(bridged, nnx.Param)
    assert state["embed"]["embedding"][...].shape == params["embed"]["embedding"].shape
    nnx.update(bridged, nnx.State(jax.tree.map(nnx.Param, params)))
    expected = forward(build_model(small_config("gqa", n_layers=1)), params, ids, attention="dense").logits
    np.testing.assert_allclose(bridged(ids, attention="dense").logits, expected, atol=1e-5)
