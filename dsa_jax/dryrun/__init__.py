"""What a recipe needs, found out with nothing allocated: parameters, FLOPs, bytes per device, sharding, compiled programs."""

from dsa_jax.dryrun.collectives import Collective, collectives
from dsa_jax.dryrun.compiling import TARGETS, CompiledStep, compile_step, emulated_mesh, target_mesh
from dsa_jax.dryrun.programs import STEPS, DecodeShape, step_program
from dsa_jax.dryrun.sizes import bytes_per_device, sharding_table
from dsa_jax.dryrun.summary import summarize
from dsa_jax.dryrun.text import format_compiled, format_summary

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
    "sharding_table",
    "step_program",
    "summarize",
    "target_mesh",
]
