"""One setting names the implementation of every op: what it may say, and that the model follows it."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.config import ConfigError
from dsa_jax.config.implementations import AVAILABLE, Implementations, parse_implementations
from pallas_kernels import implementations_chosen
from tests.dsa_jax.model.small import built, forward, random_ids

KERNELS = "sparse_attention=pallas,index_topk=pallas,indexer_kl=pallas"


def parse(text):
    return parse_implementations("implementation", text)


def test_what_a_setting_may_say():
    assert parse("auto") == Implementations() and set(parse("auto")) == {None}
    assert set(parse("xla")) == {"xla"}
    mixed = parse("sparse_attention=pallas, index_topk=triton")
    assert mixed == Implementations(sparse_attention="pallas", index_topk="triton")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("palas", "is 'palas'; expected auto, one of reference, xla, pallas, triton, mosaic, or a list such as"),
        (
            "pallas",
            "dense_attention has no implementation 'pallas'; it has reference, xla. .*index_topk=pallas,",
        ),
        ("indexer_kl=triton", "indexer_kl has no implementation 'triton'; it has reference, xla, pallas. .*index_topk=triton;"),
        ("index_topc=xla", "names the op 'index_topc'; expected one of .* Did you mean 'index_topk'?"),
        ("index_topk=xla,index_topk=pallas", "names index_topk twice"),
        ("index_topk=xla,", "names the op ''"),
    ],
)
def test_what_it_may_not_say(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize("op", Implementations._fields)
def test_the_names_are_those_that_the_op_has(op):
    folder = {"attention_topk": "dense_attention", "indexer_kl": "indexer_loss"}.get(op, op)
    table = {"index_topk": "_TOPK", "attention_topk": "_TOPK", "dense_attention": "_DENSE"}.get(op, "_IMPLEMENTATIONS")
    assert set(AVAILABLE[op]) == set(getattr(importlib.import_module(f"pallas_kernels.{folder}.api"), table))


@pytest.mark.parametrize(("attention", "loss"), [("dense", "dense"), ("sparse", "sparse")])
def test_the_model_trains_through_kernels_where_they_are_named(attention, loss):
    """Dense attention, which has no kernel here, runs beside those that are asked for: both stages of a retrofit."""
    ids = random_ids(1)

    def learn(model, params):
        def objective(params):
            output = forward(model, params, ids, attention=attention, indexer_loss=loss)
            return jnp.square(output.logits).mean() + output.indexer_kl.sum(), output.indexer_kl

        return jax.value_and_grad(objective, has_aux=True)(params)

    (plain, params), (kernels, _) = (built("gqa", n_layers=1, implementation=name) for name in ("reference", KERNELS))
    (value, kl), gradients = learn(kernels, params)
    (expected, expected_kl), expected_gradients = learn(plain, params)
    assert "pallas" in implementations_chosen()["indexer_kl"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(kl, expected_kl, rtol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)
