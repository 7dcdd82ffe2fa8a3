"""What a recipe needs, found out with nothing allocated: parameters, FLOPs, bytes per device, sharding, compiled programs."""

from dsa_jax.dryrun.collectives import Collective, collectives
from dsa_jax.dryrun.compiling import TARGETS, CompiledStep, compile_step, emulated_mesh, target_mesh
from dsa_jax.dryrun.products import product_flops
from dsa_jax.dryrun.programs import STEPS, DecodeShape, step_program
from dsa_jax.dryrun.sizes import bytes_per_device, sharding_table
from dsa_jax.dryrun.summary import summarize
from dsa_jax.dryrun.text import format_compiled, format_summary
from dsa_jax.dryrun.weak_scaling import format_weak_scaling, rungs, weak_scaling

__all__ = [
    "STEPS",
    "TARGETS",
    "Collective",
    "CompiledStep",
    "DecodeShape",
    "bytes_per_device",
    "collectives",
    "compile_step",
    "emulated_mesh",
    "format_compiled",
    "format_summary",
    "format_weak_scaling",
    "product_flops",
    "rungs",
    "sharding_table",
    "step_program",
    "summarize",
    "target_mesh",
    "weak_scaling",
]
