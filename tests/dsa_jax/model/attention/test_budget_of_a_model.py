"""A model whose topk exceeds the tokens there are computes what it computes with as many as tokens, at that cost."""

import functools

import jax
import numpy as np
import pytest

from dsa_jax.config.selections import common_selections
from dsa_jax.model import build_model
from tests.dsa_jax.model.small import LENGTH, built, random_ids, small_config
from tests.pallas_kernels.ops_helpers import arrays_with

ROLES = ("full", "shared")
BEYOND = 1000


@functools.cache
def pair():
    """(model with topk = LENGTH, the same with far more, parameters)."""
    model, params = built("gqa", topk=LENGTH, layer_types=ROLES)
    return model, build_model(small_config("gqa", topk=BEYOND, layer_types=ROLES)), params


def loss_of(model, attention):
    def loss(params):
        output = model.apply({"params": params}, random_ids(), attention=attention, indexer_loss="sparse")
        return output.logits.sum() + output.indexer_kl.sum(), output.logits

    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("attention", [name for name in common_selections() if name != "dense"])
def test_no_array_of_a_training_step_has_that_many_slots(attention):
    _, beyond, params = pair()
    made = arrays_with(jax.make_jaxpr(loss_of(beyond, attention))(params).jaxpr, BEYOND)
    assert set(made) <= {"pad"}, made


def test_decoding_has_the_same_bits():
    exact, beyond, params = pair()

    def run(model):
        def extend(cache):
            options = {"attention": "sparse", "return_topk_indices": True, "method": "extend"}
            return model.apply({"params": params}, random_ids()[:, :3], np.full(2, 3), cache, **options)

        cache = model.init_cache(2, LENGTH)
        return jax.jit(extend)(cache), arrays_with(jax.make_jaxpr(extend)(cache).jaxpr, BEYOND)

    (near, _), (far, made) = run(exact), run(beyond)
    np.testing.assert_array_equal(near.logits, far.logits)
    np.testing.assert_array_equal(near.topk_indices, far.topk_indices[..., :LENGTH])
    assert far.topk_indices.shape[-1] == BEYOND and set(made) <= {"pad"}
