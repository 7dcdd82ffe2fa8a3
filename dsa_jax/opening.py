"""The first line of every command: on what it computes, in which dtypes, how many parameters, and how many are trained."""

from collections.abc import Sequence

import jax

from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ModelConfig, ParallelConfig
from dsa_jax.config.model import OF_CHECKPOINT
from dsa_jax.model import abstract_params, build_model
from dsa_jax.params import count_parameters, split_parameters
from dsa_jax.train.stages import Stage, stage_of


def opening_line(
    model: ModelConfig | None, parallel: ParallelConfig | None = None, stages: Sequence[Stage] = (), *, dtype: str = ""
) -> str:
    """Devices, mesh, dtypes and parameters in one line, such as

        8 x NVIDIA H200; mesh fsdp 8; parameters float32, computed in bfloat16; 8,513,968,128 parameters, trained in warmup
        323,232,768, in sparse 8,513,968,128

    Args:
        model: resolved; None for a command whose rows say what each computes.
        parallel: the layout of devices; None: one device.
        stages: those that a training command runs.
        dtype: `model.dtype` as it was asked for; where that was "checkpoint", a CPU says why it computes in float32.
    """
    devices = jax.devices()
    sizes = (parallel or ParallelConfig()).sizes()
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    parts = [f"{len(devices)} x {devices[0].device_kind}", f"mesh {mesh}" if mesh else "no mesh, one device computes"]
    if model is None:
        return "; ".join((*parts, "dtypes and sizes as in each row"))
    emulated = " (on a CPU, which emulates bfloat16)" if dtype == OF_CHECKPOINT and devices[0].platform == "cpu" else ""
    parts.append(f"parameters {model.param_dtype}, computed in {model.dtype}{emulated}")
    params = abstract_params(build_model(model))
    trained = [f"in {stage.name} {count_parameters(split_parameters(params, stage.trains)[0]):,}" for stage in stages]
    counted = f"{count_parameters(params):,} parameters"
    return "; ".join((*parts, f"{counted}, trained {', '.join(trained)}" if trained else counted))


def opening_of(config: Config, *, dtype: str = "") -> str:
    """`opening_line` of a resolved recipe with the stages that it runs."""
    stages = [stage_of(config, name) for name in STAGE_ORDER if getattr(config.train, name).n_steps]
    return opening_line(config.model, config.parallel, stages, dtype=dtype)
