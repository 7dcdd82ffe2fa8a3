"""Text from a model that is spread out is the text of one device."""

import contextlib
import math

import jax
import pytest

from dsa_jax.config import ParallelConfig
from dsa_jax.generation import generate
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.placement import place
from dsa_jax.pretrained import Pretrained
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
    with jax.set_mesh(make_mesh(layout, jax.devices()[:n_devices])) if n_devices > 1 else contextlib.nullcontext():
        loaded = Pretrained(small_config(**fields), model, place(params), None)
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
