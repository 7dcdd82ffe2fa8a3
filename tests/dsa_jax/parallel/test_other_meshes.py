"""The model as a part of somebody else's program: under a mesh of other axes, and inside a `jax.shard_map` over one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.dsa_jax.model.small import VOCAB, built, random_ids

CASES = {
    "dense": ("gqa", False, "dense", "dense"),
    "sparse": ("gqa", False, "sparse", "sparse"),
    "coarse_to_fine": ("gqa", False, "coarse_to_fine", "sparse"),
    "window": ("gqa", False, "window", None),
    "experts": ("mla", True, "sparse", "sparse"),
}


def loss(model, attention, indexer_loss, params, input_ids, *, parts=1):
    """Of one of `parts` equal parts of a batch; their sum does not depend on how many they are."""
    output = model.apply({"params": params}, input_ids, attention=attention, indexer_loss=indexer_loss)
    likelihood = (output.logits * jnp.sin(jnp.arange(VOCAB))).sum() / VOCAB
    return likelihood + (0 if indexer_loss is None else output.indexer_kl.sum() / parts)


@pytest.mark.parametrize("name", CASES)
def test_computes_what_it_does_by_itself(name):
    kind, moe, *request = CASES[name]
    model, params = built(kind, moe=moe, implementation="xla")
    mesh = jax.make_mesh((2,), ("replica",), axis_types=(AxisType.Auto,))
    split, input_ids = PartitionSpec("replica"), random_ids()
    gradient = jax.value_and_grad(functools.partial(loss, model, *request))

    def on_each(params, input_ids):
        value, gradients = jax.value_and_grad(functools.partial(loss, model, *request, parts=2))(params, input_ids)
        return jax.lax.psum(value, "replica"), gradients  # shard_map itself sums those in what all devices share

    expected = jax.jit(gradient)(params, input_ids)
    inside = jax.shard_map(on_each, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=PartitionSpec())
    results = [jax.jit(inside)(params, input_ids)]
    with jax.set_mesh(mesh):
        results.append(jax.jit(gradient)(params, jax.device_put(input_ids, NamedSharding(mesh, split))))
    for got in results:
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))
