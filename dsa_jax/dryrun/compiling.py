"""Compiling a training or decode step for emulated devices, or for GPUs that are not here, and the compiler's memory report."""

import importlib.util
import math
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.dryrun.hlo import Collective, collectives, matmul_flops
from dsa_jax.dryrun.summary import GB
from dsa_jax.generation.programs import Mode, Sampling, State, decode
from dsa_jax.model import abstract_params, build_model
from dsa_jax.parallel.ambient import ROWS
from dsa_jax.parallel.check import check_stage
from dsa_jax.parallel.mesh import make_mesh
from dsa_jax.parallel.placement import shardings_of
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state, make_train_step

STEPS = (*STAGE_ORDER, "decode")
TARGETS = {"h200": (Path(__file__).parents[1] / "benchmarks" / "h200.txtpb", 141_000_000_000)}
"""By name: the committed description for the compiler, and the bytes of device memory."""
_PLUGIN = "jax_plugins.xla_cuda13"


class DecodeShape(NamedTuple):
    """A decode step.

    Fields: `rows` sequences of up to `context` tokens; `cache_dtype` "" is the dtype of the activations.
    """

    rows: int = 1
    context: int = 131072
    cache_dtype: str = ""


Program = tuple[Any, tuple[Any, ...]]
"""A jitted function and its abstract arguments."""


def step_program(config: Config, step: str, mesh: Mesh, decode_shape: DecodeShape) -> Program:
    """The training step of a stage, or the decode step, of the recipe on `mesh`; call it under `jax.set_mesh(mesh)`.

    Raises:
        ConfigError: for an unknown step, or one that this model has no indexer for.
    """
    if step not in STEPS:
        raise ConfigError(f"the step is {step!r}; expected one of {', '.join(STEPS)}.")
    if step == "decode":
        if config.model.attention.nsa.enabled:
            raise ConfigError(
                "the step is 'decode', but native sparse attention has no decode step. Set model.attention.nsa.enabled=False."
            )
        return _decode_step(config, mesh, decode_shape)
    if stage_of(config, step).indexer_loss and not config.model.attention.indexer.enabled:
        raise ConfigError(f"the step is {step!r}, but the model has no indexer. Set model.attention.indexer.enabled=True.")
    check_stage(config, step)
    return _train_step(config, step, mesh)


def _train_step(config: Config, step: str, mesh: Mesh) -> Program:
    model, stage, settings = build_model(config.model), stage_of(config, step), getattr(config.train, step)
    state = jax.eval_shape(lambda params: init_state(params, stage, settings), abstract_params(model))
    rows = NamedSharding(mesh, ROWS)
    tokens: Any = lambda dtype: jax.ShapeDtypeStruct((settings.batch_size, settings.longest), dtype, sharding=rows)
    batch: Any = Batch(*map(tokens, (jnp.int32, jnp.int32, jnp.bool_, jnp.int32)))
    return make_train_step(model, stage, config), (_placed(state, mesh), batch)


def _decode_step(config: Config, mesh: Mesh, shape: DecodeShape) -> Program:
    attention = "sparse" if config.model.attention.indexer.enabled else "dense"
    if shape.context > config.model.max_positions:
        raise ConfigError(f"a context of {shape.context} is more than model.max_positions ({config.model.max_positions}).")
    model = build_model(config.model)
    cache = jax.eval_shape(
        lambda: model.init_cache(
            shape.rows, shape.context, dtype=shape.cache_dtype or None, with_index_keys=attention == "sparse"
        )
    )
    number: Any = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)
    state = State(cache, number(jnp.int32, shape.rows), number(jnp.bool_, shape.rows), number(jnp.int32))
    stop = len(config.model.eos_token_ids)
    sampling = Sampling(number(jnp.uint32), number(jnp.float32), number(jnp.float32), number(jnp.int32, stop))
    # As `generate` places them: the same on every device.
    same = NamedSharding(mesh, PartitionSpec())
    state, sampling = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=same), (state, sampling))
    mode = Mode(attention, samples=False, nucleus=False)

    def decode_step(params: Any, sampling: Sampling, state: State) -> State:
        return decode(model, mode, params, sampling, state)

    params = abstract_params(model)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    function = jax.jit(decode_step, donate_argnums=2, out_shardings=shardings)
    return function, (_placed(params, mesh), sampling, state)


def _placed(tree: Any, mesh: Mesh) -> Any:
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, shardings_of(tree, mesh))


class CompiledStep(NamedTuple):
    """The compiler's memory report of a step, in bytes on each device.

    Fields: `arguments` parameters, state and batch; `outputs`; `aliased` outputs that reuse arguments; `temporaries` all else;
    `seconds` spent tracing and compiling; `platform` compiled for; `flops` of its matmuls, see `matmul_flops`.
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
        function, arguments = step_program(config, step, mesh, decode_shape or DecodeShape())
        executable = function.lower(*arguments).compile()
    memory, text = executable.memory_analysis(), executable.as_text()
    return CompiledStep(
        step=step,
        platform=mesh.devices.flat[0].device_kind,
        seconds=time.perf_counter() - begin,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=matmul_flops(text),
        collectives=collectives(text),
    )


def format_compiled(result: CompiledStep, device_bytes: float) -> str:
    """The compiler's memory and the collectives of one step."""
    fits = "fits in" if result.peak <= device_bytes else "DOES NOT FIT in"
    lines = [
        f"{result.step} step compiled for {result.platform} in {result.seconds:.0f} s; the compiler's GB per device",
        f"  {'arguments':42}{result.arguments / GB:12.2f}",
        f"  {'outputs that reuse no argument':42}{(result.outputs - result.aliased) / GB:12.2f}",
        f"  {'temporaries':42}{result.temporaries / GB:12.2f}",
        f"  {'together':42}{result.peak / GB:12.2f}  {fits} {device_bytes / GB:g} GB",
        "",
    ]
    if not result.collectives:
        return "\n".join([*lines, "collectives per step: none"])
    lines.append(f"{'collectives per step and device':27}{'group':>7}{'times':>9}{'GB':>12}  shape")
    for each in result.collectives:
        lines.append(f"  {each.kind:25}{each.group or '-':>7}{each.times:9,}{each.bytes / GB:12.4f}  {_shortened(each.shape)}")
    total = sum(each.bytes for each in result.collectives)
    times = sum(each.times for each in result.collectives)
    return "\n".join([*lines, f"  {'all':25}{'':7}{times:9,}{total / GB:12.4f}"])


def _shortened(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 4] + " ..."
