"""Eight emulated devices as the layouts that are tested."""

import functools

import jax

from dsa_jax.config import ParallelConfig
from dsa_jax.parallel.mesh import make_mesh

PRESETS = ("fsdp8", "ep8", "tp8", "ep4_tp2", "fsdp2_tp2_cp2", "dp2_cp4")


@functools.cache
def mesh(preset):
    """The mesh of a preset over the eight devices."""
    assert jax.device_count() == 8
    return make_mesh(ParallelConfig(preset=preset))
