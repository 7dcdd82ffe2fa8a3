"""The indexer's variants, all at once: eight devices compute what one does, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax.parallel.placement import place
from dsa_jax.params import parameter_paths
from tests.dsa_jax.model.small import built, random_ids
from tests.dsa_jax.parallel.meshes import mesh

VARIANT = (
    ("activation", "none"),
    ("head_weights", "constant"),
    ("forced_sink", 1),
    ("forced_local", 2),
    ("distill_shared", True),
    ("coarse_block_size", 4),
    ("coarse_loss_weight", 0.5),
)


@functools.partial(jax.jit, static_argnums=(0, 3))
def gradients(model, params, input_ids, indexer_loss):
    def loss(params):
        asked = {"attention": "sparse", "indexer_loss": indexer_loss, "return_topk_indices": True}
        out = model.apply({"params": params}, input_ids, **asked)
        return jax.nn.logsumexp(out.logits, axis=-1).mean() + out.indexer_kl.sum(), (out.indexer_kl, out.topk_indices)

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize(
    ("indexer_loss", "layer_types"),
    [("sparse", ("full", "shared")), ("dense", ("full", "shared")), ("sparse", ("window", "full", "dense", "shared"))],
)
def test_rows_heads_and_positions_split(indexer_loss, layer_types):
    model, params = built("gqa", layer_types=layer_types, implementation="xla", variant=VARIANT)
    input_ids = random_ids(4)
    wanted, (kl, indices) = jax.device_get(gradients(model, params, input_ids, indexer_loss))
    with jax.set_mesh(mesh("fsdp2_tp2_cp2")):
        got, (sharded_kl, sharded_indices) = jax.device_get(
            gradients(model, place(params), jnp.asarray(input_ids), indexer_loss)
        )
    np.testing.assert_allclose(sharded_kl, kl, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sharded_indices, indices)
    for path, gradient in parameter_paths(wanted).items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(parameter_paths(got)[path], gradient, rtol=1e-5, atol=1e-5 * scale + 1e-12, err_msg=path)
