"""Checks that a recipe fits its mesh, before anything is allocated."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsa_jax.config import BATCH_AXES, STAGES, Config, ConfigError
from dsa_jax.model import abstract_params, build_model
from dsa_jax.model.attention.kinds import kinds_of
from dsa_jax.parallel.rules import check_divisible

_ROWS = " x ".join(BATCH_AXES)


class _Complaint(NamedTuple):
    """What does not divide, and the flags that mend it; none where only another layout or model does."""

    text: str
    remedy: str = ""


def check_layout(config: Config) -> None:
    """Check that heads, experts, parameters, batches and sequences split evenly.

    Raises:
        ConfigError: naming every field that does not, its value and the axis size, and the overrides that mend them together.
    """
    if math.prod(config.parallel.sizes().values()) == 1:
        return
    config = config.laid_out()
    stages = [name for name in STAGES if getattr(config.train, name).n_steps]
    _refuse([*_of_the_model(config), *(each for name in stages for each in _of_a_stage(config, name)), *_of_eval(config)])


def check_stage(config: Config, name: str) -> None:
    """Check that the batches of a stage split evenly over the mesh.

    Raises:
        ConfigError: naming every size that does not divide.
    """
    _refuse(list(_of_a_stage(config.laid_out(), name)))


def _refuse(complaints: Sequence[_Complaint]) -> None:
    if complaints:
        remedies = " ".join(dict.fromkeys(each.remedy for each in complaints if each.remedy))
        raise ConfigError("; ".join(each.text for each in complaints) + (f". Give {remedies}" if remedies else "."))


def _of_the_model(config: Config) -> Iterator[_Complaint]:
    sizes, moe = config.parallel.sizes(), config.model.moe
    for kind in kinds_of(config.model):
        for name, count in kind.split_heads(config.model.attention).items():
            yield from _multiple(f"model.attention.{name}", count, "tensor", sizes["tensor"])
    if sizes["expert"] > 1 and not moe.n_routed_experts:
        yield _Complaint(f"parallel.expert is {sizes['expert']}, but the model has no experts: use fsdp or data instead")
    elif sizes["expert"] > 1:
        yield from _multiple("model.moe.n_routed_experts", moe.n_routed_experts, "expert", sizes["expert"])
    try:
        check_divisible(abstract_params(build_model(config.model)), sizes)
    except ConfigError as error:
        yield _Complaint(str(error).removesuffix("."))


def _of_a_stage(config: Config, name: str) -> Iterator[_Complaint]:
    """Complaints about a stage of a recipe that is laid out."""
    stage, field = getattr(config.train, name), f"train.{name}"
    n_parts, n_context = config.parallel.row_parts, config.parallel.sizes()["context"]
    remedy = f"--config.{field}.accumulation=0"
    if stage.batch_size % n_parts:
        remedy = f"--config.{field}.batch_size={_next(stage.batch_size, n_parts)} {remedy}"
    rows = stage.batch_size // stage.accumulation
    yield from _multiple(f"{field}.batch_size / accumulation", rows, _ROWS, n_parts, remedy)
    yield from _positions(f"{field}.seq_len", stage.seq_len, n_context)
    for _, length in stage.curriculum:
        yield from _multiple(f"{field}.curriculum's seq_len", length, "2 x context", 2 * n_context if n_context > 1 else 1)


def _of_eval(config: Config) -> Iterator[_Complaint]:
    settings, remedy = config.eval, "--config.eval.batch_size=0"
    yield from _multiple("eval.batch_size", settings.batch_size, _ROWS, config.parallel.row_parts, remedy)
    used = {"recall": settings.recall_sequences, "text": settings.text_sequences, "task": len(settings.tasks)}
    for name in (f"{name}_len" for name, is_used in used.items() if is_used):
        yield from _positions(f"eval.{name}", getattr(settings, name), config.parallel.sizes()["context"])
    if settings.text_tasks and (size := 2 * config.parallel.sizes()["context"]) > 2:
        remedy = f"--config.eval.text_task_lens={tuple(_next(length, size) for length in settings.text_task_lens)}"
        for length in settings.text_task_lens:
            yield from _multiple("eval.text_task_lens", length, "2 x context", size, f"'{remedy}'")


def _positions(name: str, length: int, n_context: int) -> Iterator[_Complaint]:
    if n_context > 1:
        remedy = f"--config.{name}={_next(length, 2 * n_context)}"
        yield from _multiple(name, length, "2 x context", 2 * n_context, remedy)


def _multiple(name: str, value: int, axis: str, size: int, remedy: str = "") -> Iterator[_Complaint]:
    if value % size:
        yield _Complaint(f"{name} is {value}; expected a multiple of {size} (parallel: {axis})", remedy)


def _next(value: int, size: int) -> int:
    """The least multiple of `size` from `value` on."""
    return -(-value // size) * size
