"""Needs of a recipe, with nothing allocated: parameters, FLOPs, bytes per device, sharding, compiled programs; a verdict."""

from dsa_jax.dryrun.compiling import DecodeShape, compile_step, emulated_mesh, format_compiled, target_mesh
from dsa_jax.dryrun.hlo import Collective, collectives, matmul_flops
from dsa_jax.dryrun.memory import bytes_per_device, sharding_table
from dsa_jax.dryrun.summary import format_summary, summarize
from dsa_jax.dryrun.verdict import Assumed, Machine, format_verdict, judge, parse_machine
from dsa_jax.dryrun.weak_scaling import format_weak_scaling, rungs, weak_scaling

__all__ = [
    "Assumed",
    "Collective",
    "DecodeShape",
    "Machine",
    "bytes_per_device",
    "collectives",
    "compile_step",
    "emulated_mesh",
    "format_compiled",
    "format_summary",
    "format_verdict",
    "format_weak_scaling",
    "judge",
    "matmul_flops",
    "parse_machine",
    "rungs",
    "sharding_table",
    "summarize",
    "target_mesh",
    "weak_scaling",
]
