"""Weights in fp8 blocks, split over devices at any column, compute what one device does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsa_jax import load_pretrained
from dsa_jax.config import ParallelConfig
from dsa_jax.model.moe.experts import ExpertKernels, routed_sum
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.placement import current_mesh
from dsa_jax.params import parameter_paths
from tests.dsa_jax.model.in_blocks import meaning, random_blocks
from tests.dsa_jax.model.small import forward
from tests.dsa_jax.parallel.meshes import mesh

FIXTURE = "tests/fixtures/hf/deepseek_v32_fp8"


def logits():
    """Of the fixture, loaded onto the mesh there is."""
    loaded = load_pretrained(FIXTURE, dtype="float32", weight_format="fp8_blocks", mesh=current_mesh())
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 16)), jnp.int32)
    return parameter_paths(loaded.params), np.asarray(forward(loaded.model, loaded.params, ids, attention="dense").logits)


@pytest.fixture(scope="module")
def expected():
    return logits()[1]


@pytest.mark.parametrize(
    ("preset", "path", "share"),
    [
        ("tp2", "dense_layers/mlp/gate/kernel", (1, 144, 96)),
        ("ep2", "moe_layers/mlp/experts/up/kernel", (1, 2, 144, 12)),
        ("fsdp2", "moe_layers/attention/wq_a/kernel", (1, 72, 48)),
    ],
)
def test_a_spread_model_computes_what_one_device_does(preset, path, share, expected):
    with jax.set_mesh(make_mesh(ParallelConfig(preset=preset), jax.devices()[:2])):
        params, found = logits()
    assert params[path].addressable_shards[0].data.shape == share  # 96 columns and 72 rows cut blocks of 128
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_experts_whose_width_is_cut_inside_a_block():
    """160 columns on two tensor ranks: the second begins at 80 and ends in the second block."""
    rng = np.random.default_rng(0)
    kernels = ExpertKernels(*(random_blocks(4, *shape, seed=i) for i, shape in enumerate([(136, 160)] * 2 + [(160, 136)])))
    x, weights = (jnp.asarray(rng.standard_normal((4, 2, size)), jnp.float32) for size in (136, 2))
    experts = jnp.asarray(rng.integers(0, 4, (4, 2, 2)), jnp.int32)
    plain = ExpertKernels(*(jnp.asarray(meaning(kernel)) for kernel in kernels))
    wanted = jax.jit(routed_sum)(x, experts, weights, plain)
    with jax.set_mesh(mesh("ep4_tp2")):
        found = jax.jit(routed_sum)(x, experts, weights, kernels)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(jnp.abs(wanted).max()))
