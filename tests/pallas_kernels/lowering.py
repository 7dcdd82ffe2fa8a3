"""Lowers a function for an NVIDIA H200 on a machine without one: checks everything up to Triton's own compiler."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

TRITON_CALL = "__gpu$xla.gpu.triton"


def lower_for_h200(function, *shapes):
    """Text of the lowered program."""
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "cuda"))
    with use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def kernel_calls(function, *shapes):
    """Number of Triton kernels in the lowered program."""
    return lower_for_h200(function, *shapes).count(TRITON_CALL)
