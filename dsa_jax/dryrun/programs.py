"""The programs that a dry run can compile, with abstract arguments that say where everything lies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.generation.programs import Mode, Sampling, State, decode
from dsa_jax.model import abstract_params, build_model
from dsa_jax.parallel.ambient import ROWS
from dsa_jax.parallel.check import check_stage
from dsa_jax.parallel.placement import shardings_of
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state, make_train_step

STEPS = (*STAGE_ORDER, "decode")


class DecodeShape(NamedTuple):
    """A decode step.

    Fields: `rows` sequences of up to `context` tokens; `cache_dtype` "" is the dtype of the activations.
    """

    rows: int = 1
    context: int = 131072
    cache_dtype: str = ""


class Program(NamedTuple):
    """A jitted function and its abstract arguments."""

    function: Any
    arguments: tuple[Any, ...]


def step_program(config: Config, step: str, mesh: Mesh, decode_shape: DecodeShape) -> Program:
    """The training step of a stage, or the decode step, of the recipe on `mesh`; call it under `jax.set_mesh(mesh)`.

    Raises:
        ConfigError: for an unknown step, or one that this model has no indexer for.
    """
    if step not in STEPS:
        raise ConfigError(f"the step is {step!r}; expected one of {', '.join(STEPS)}.")
    if step == "decode":
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
    return Program(make_train_step(model, stage, config), (_placed(state, mesh), batch))


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
    return Program(function, (_placed(params, mesh), sampling, state))


def _placed(tree: Any, mesh: Mesh) -> Any:
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, shardings_of(tree, mesh))
