"""One device and eight compute the same: losses, KL, selections and every gradient, in all three stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.rules import parameter_spec
from dsa_jax.params import nested_parameters, parameter_paths
from dsa_jax.train.stages import STAGES
from tests.dsa_jax.model.small import VOCAB, built
from tests.dsa_jax.parallel.meshes import mesh

BATCH, LENGTH = 8, 32
# Without fp8, whose rounding turns the last bit of a sum into a step.
KINDS = {
    "mla_float": {"moe": True, "vocab_size": VOCAB},
    "gqa": {},
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def everything(model, stage_name, params, input_ids, segment_ids):
    stage = STAGES[stage_name]

    def loss(params):
        output = model.apply(
            {"params": params},
            input_ids,
            segment_ids=segment_ids,
            attention=stage.attention,
            indexer_loss=stage.indexer_loss,
            return_topk_indices=stage.attention == "sparse",
        )
        log_p = jax.nn.log_softmax(output.logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, input_ids[:, 1:, None], axis=-1).mean()
        kl = jnp.zeros(()) if output.indexer_kl is None else output.indexer_kl
        balance = 0.0 if output.moe is None else output.moe.balance_loss.sum()
        return nll + kl.sum() + 0.01 * balance, (nll, kl, output.topk_indices, output.moe)

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return results, gradients


def batch():
    rng = np.random.default_rng(1)
    input_ids = rng.integers(0, VOCAB, (BATCH, LENGTH))
    segment_ids = np.ones((BATCH, LENGTH), np.int32)
    segment_ids[1, 10:] = 2
    segment_ids[2, 20:] = 0
    segment_ids[3] = 0
    return jnp.asarray(input_ids, jnp.int32), jnp.asarray(segment_ids)


@functools.cache
def expected(kind, stage):
    model, params = built(kind, implementation="xla", **KINDS[kind])
    return jax.device_get(everything(model, stage, params, *batch()))


@pytest.mark.parametrize("stage", ["pretrain", "warmup", "sparse"])
@pytest.mark.parametrize(
    ("kind", "preset"),
    [("mla_float", "ep2_tp2_cp2"), ("mla_float", "ep2_fsdp4"), ("gqa", "tp2_cp4"), ("gqa", "fsdp4_tp2")],
)
def test_eight_devices_compute_what_one_does(kind, preset, stage):
    model, params = built(kind, implementation="xla", **KINDS[kind])
    on = mesh(preset)
    placed = nested_parameters(
        {path: jax.device_put(leaf, NamedSharding(on, parameter_spec(path))) for path, leaf in parameter_paths(params).items()}
    )
    with jax.set_mesh(on):
        tokens = jax.device_put(batch(), NamedSharding(on, jax.sharding.PartitionSpec(BATCH_AXES)))
        results, gradients = jax.device_get(everything(model, stage, placed, *tokens))
    expected_results, expected_gradients = expected(kind, stage)
    np.testing.assert_allclose(results[0], expected_results[0], rtol=1e-5)
    np.testing.assert_allclose(results[1], expected_results[1], rtol=1e-5, atol=1e-6)
    if stage == "sparse":
        np.testing.assert_array_equal(results[2], expected_results[2])
    if results[3] is not None:
        np.testing.assert_array_equal(results[3].expert_counts, expected_results[3].expert_counts)
    wanted = parameter_paths(expected_gradients)
    for path, gradient in parameter_paths(gradients).items():
        scale = np.abs(wanted[path]).max()
        np.testing.assert_allclose(gradient, wanted[path], rtol=1e-5, atol=1e-5 * scale + 1e-12, err_msg=path)
