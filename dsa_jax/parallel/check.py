"""Checks that a recipe fits its mesh, before anything is allocated."""

import math

from dsa_jax.config import STAGES, Config, ConfigError
from dsa_jax.model import abstract_params, build_model
from dsa_jax.model.attention.kinds import kinds_of
from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.rules import check_divisible

_ROWS = " x ".join(BATCH_AXES)


def check_layout(config: Config) -> None:
    """Check that heads, experts, parameters, batches and sequences split evenly.

    Raises:
        ConfigError: naming the first field that does not, its value and the axis size.
    """
    sizes = config.parallel.sizes()
    if math.prod(sizes.values()) == 1:
        return
    moe = config.model.moe
    for kind in kinds_of(config.model):
        for name, count in kind.split_heads(config.model.attention).items():
            _multiple(f"model.attention.{name}", count, "tensor", sizes["tensor"])
    if sizes["expert"] > 1:
        if not moe.n_routed_experts:
            raise ConfigError(f"parallel.expert is {sizes['expert']}, but the model has no experts. Use fsdp or data instead.")
        _multiple("model.moe.n_routed_experts", moe.n_routed_experts, "expert", sizes["expert"])
    model = build_model(config.model)
    check_divisible(abstract_params(model), sizes)

    for name in (name for name in STAGES if getattr(config.train, name).n_steps):
        check_stage(config, name)
    _multiple("eval.batch_size", config.eval.batch_size, _ROWS, math.prod(sizes[name] for name in BATCH_AXES))
    used = {"recall": config.eval.recall_sequences, "text": config.eval.text_sequences, "task": len(config.eval.tasks)}
    for name, is_used in used.items():
        if is_used:
            length = getattr(config.eval, f"{name}_len")
            _multiple(f"eval.{name}_len", length, "2 x context", 2 * sizes["context"], only_if=sizes["context"] > 1)


def check_stage(config: Config, name: str) -> None:
    """Check that the batches of a stage split evenly over the mesh.

    Raises:
        ConfigError: naming the size that does not divide.
    """
    stage, sizes = getattr(config.train, name), config.parallel.sizes()
    n_parts = math.prod(sizes[axis] for axis in BATCH_AXES)
    _multiple(f"train.{name}.batch_size / accumulation", stage.batch_size // stage.accumulation, _ROWS, n_parts)
    for length in stage.lengths:
        _multiple(f"train.{name}.seq_len", length, "2 x context", 2 * sizes["context"], only_if=sizes["context"] > 1)


def _multiple(name: str, value: int, axis: str, size: int, *, only_if: bool = True) -> None:
    if only_if and value % size:
        raise ConfigError(f"{name} is {value}; expected a multiple of {size} (parallel: {axis}).")
