"""Compiling a step for emulated devices, or for GPUs that are not here, and what the compiler says about it."""

import importlib.util
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from dsa_jax.config import Config, ConfigError
from dsa_jax.dryrun.collectives import Collective, collectives
from dsa_jax.dryrun.products import product_flops
from dsa_jax.dryrun.programs import DecodeShape, step_program
from dsa_jax.parallel.mesh import make_mesh

TARGETS = {"h200": (Path(__file__).parents[1] / "benchmarks" / "h200.txtpb", 141_000_000_000)}
"""By name: the committed description for the compiler, and the bytes of device memory."""
_PLUGIN = "jax_plugins.xla_cuda13"


class CompiledStep(NamedTuple):
    """What the compiler says, bytes on each device.

    Fields: `arguments` parameters, state and batch; `outputs`; `aliased` outputs that reuse arguments; `temporaries` all else;
    `seconds` spent tracing and compiling; `platform` compiled for; `flops` of the matrix products, see `product_flops`.
    """

    step: str
    platform: str
    seconds: float
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    flops: int
    collectives: list[Collective]

    @property
    def peak(self) -> int:
        """Arguments, outputs and temporaries together."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


def emulated_mesh(config: Config) -> Mesh:
    """The recipe's mesh over emulated CPU devices.

    Raises:
        ConfigError: when this process shows fewer devices than it needs.
    """
    needed = math.prod(config.parallel.sizes().values())
    return make_mesh(config.parallel, jax.devices("cpu")[:needed])


def target_mesh(config: Config, target: str) -> tuple[Mesh, int]:
    """(the recipe's mesh over GPUs that need not be here, bytes of memory of each); `target` such as h200x8.

    Raises:
        ConfigError: for an unknown target, a mesh of another size, or without the compiler.
    """
    match = re.fullmatch(r"(\w+?)x([1-9][0-9]*)", target)
    if not match or match[1] not in TARGETS:
        raise ConfigError(f"the target is {target!r}; expected {' or '.join(f'{name}xN' for name in TARGETS)}, such as h200x8.")
    folder, _, _ = _PLUGIN.partition(".")
    if importlib.util.find_spec(folder) is None or importlib.util.find_spec(_PLUGIN) is None:
        raise ConfigError(
            f"compiling for {target} needs the CUDA compiler of the extra `aot` (3 GB, Python 3.12). Run: "
            "pip install --editable '.[aot]'"
        )
    description, memory = TARGETS[match[1]]
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=match[1], target_config=description.read_text(), topology=f"1x1x{match[2]}"
    )
    return make_mesh(config.parallel, topology.devices), memory


def compile_step(config: Config, step: str, mesh: Mesh, decode_shape: DecodeShape | None = None) -> CompiledStep:
    """Trace and compile a step of the recipe for `mesh`; nothing of it is allocated.

    Raises:
        ConfigError: for an unknown step, or one that this model cannot take.
    """
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        program = step_program(config, step, mesh, decode_shape or DecodeShape())
        executable = program.function.lower(*program.arguments).compile()
    memory, text = executable.memory_analysis(), executable.as_text()
    return CompiledStep(
        step=step,
        platform=mesh.devices.flat[0].device_kind,
        seconds=time.perf_counter() - begin,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=product_flops(text),
        collectives=collectives(text),
    )
