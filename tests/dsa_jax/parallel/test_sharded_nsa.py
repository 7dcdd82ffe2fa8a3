"""Native sparse attention on eight devices: heads, rows and positions split, compressed keys in full where positions are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.rules import parameter_spec
from dsa_jax.params import nested_parameters, parameter_paths
from tests.dsa_jax.model.attention.test_nsa import model_and_params
from tests.dsa_jax.model.small import VOCAB
from tests.dsa_jax.parallel.meshes import mesh

BATCH, LENGTH = 8, 32


@functools.partial(jax.jit, static_argnums=0)
def everything(model, params, input_ids, segment_ids):
    def loss(params):
        output = model.apply({"params": params}, input_ids, segment_ids=segment_ids, attention="nsa", return_coverage=True)
        log_p = jax.nn.log_softmax(output.logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, input_ids[:, 1:, None], axis=-1).mean()
        return nll, (nll, output.keys_per_query, output.coverage)

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return results, gradients


def batch():
    rng = np.random.default_rng(1)
    segment_ids = np.ones((BATCH, LENGTH), np.int32)
    segment_ids[1, 10:], segment_ids[2, 20:], segment_ids[3] = 2, 0, 0
    return jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32), jnp.asarray(segment_ids)


def test_eight_devices_compute_what_one_does():
    model, params = model_and_params()
    expected, expected_gradients = jax.device_get(everything(model, params, *batch()))
    on = mesh("fsdp2_tp2_cp2")
    placed = nested_parameters(
        {path: jax.device_put(leaf, NamedSharding(on, parameter_spec(path))) for path, leaf in parameter_paths(params).items()}
    )
    with jax.set_mesh(on):
        tokens = jax.device_put(batch(), NamedSharding(on, PartitionSpec(BATCH_AXES)))
        results, gradients = jax.device_get(everything(model, placed, *tokens))
    for got, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    wanted = parameter_paths(expected_gradients)
    for path, gradient in parameter_paths(gradients).items():
        scale = np.abs(wanted[path]).max()
        np.testing.assert_allclose(gradient, wanted[path], rtol=1e-5, atol=1e-5 * scale + 1e-12, err_msg=path)
