"""Text from a model that is spread out is the text of one device."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import ParallelConfig
from dsa_jax.generation import generate
from dsa_jax.generation.programs import Mode, Sampling, State, compiled, decode, state_shardings
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.placement import place
from tests.dsa_jax.model.small import built, small_config

MODELS = {
    "gqa": {"kind": "gqa_qwen"},
    "mla-moe-shared": {"kind": "mla_plain", "moe": True, "layer_types": ("full", "shared", "full")},
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9], [7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]]
NEW = 7


def text(name, preset, **options):
    fields = MODELS[name] | {"implementation": "xla", "tie_embeddings": False}
    model, params = built(**fields)
    layout = ParallelConfig(preset=preset)
    n_devices = math.prod(layout.sizes().values())
    if n_devices > 1:
        with jax.set_mesh(make_mesh(layout, jax.devices()[:n_devices])):
            params = place(params)
    # The mesh is that of the parameters, whether or not it is set.
    loaded = Pretrained(small_config(**fields), model, params, None)
    return generate(loaded, PROMPTS, max_new_tokens=NEW, prefill_chunk=16, **options).token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset", "options"),
    [
        ("gqa", "tp2", {"attention": "sparse"}),
        ("gqa", "fsdp2_tp2_cp2", {"attention": "dense", "temperature": 0.9, "seed": 3}),
        ("mla-moe-shared", "ep2_tp2", {"attention": "sparse", "page_size": 4}),
    ],
)
def test_generated_text_is_that_of_one_device(name, preset, options):
    expected = text(name, "single", **options)
    assert text(name, preset, **options) == expected
    assert len({token for row in expected for token in row}) > NEW  # a text that says something


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp8"])
def test_keys_and_values_of_heads_stay_where_they_were_computed(dtype):
    model, params = built(**MODELS["gqa"], implementation="xla", tie_embeddings=False)
    mesh = make_mesh(ParallelConfig(preset="tp2"), jax.devices()[:2])
    state = State(model.init_cache(2, 96, dtype=dtype), jnp.zeros(2, jnp.int32), jnp.ones(2, bool), jnp.zeros((), jnp.int32))
    shardings = state_shardings(state, mesh)
    with jax.set_mesh(mesh):
        params, state = place(params), jax.device_put(state, shardings)
        sampling = Sampling(jnp.uint32(0), jnp.float32(0), jnp.float32(1), jnp.zeros(1, jnp.int32))
        program, _ = compiled(decode, model, Mode("sparse", False, False), params, sampling, state)
    for name, pool in state.cache.pools["dense_layers"].items():
        split = pool.sharding.shard_shape(pool.shape)[2] * 2 == pool.shape[2]
        assert split == (name != "index_keys"), name
    exchanged = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-\w+|collective-permute|reduce-scatter)\(", program.as_text())
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in exchanged]
    assert sizes and max(sizes) <= 2 * model.config.hidden_dim  # the outputs of two rows, never a cache
