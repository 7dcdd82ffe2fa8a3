"""Everything about a recipe that follows from shapes alone, as JSON values."""

import math
from typing import Any

import jax

from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config
from dsa_jax.costs.model import (
    ATTENTIONS,
    active_weights,
    cache_bytes_per_token,
    forward_flops_per_token,
    training_flops_per_token,
)
from dsa_jax.costs.report import CACHE_DTYPES
from dsa_jax.dryrun.activations import estimate_activations
from dsa_jax.dryrun.programs import abstract_params
from dsa_jax.dryrun.sizes import bytes_per_device, sharding_table
from dsa_jax.model import Transformer, build_model
from dsa_jax.parallel.check import check_layout
from dsa_jax.params import count_parameters, is_indexer_path, split_parameters
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state


def summarize(config: Config) -> dict[str, Any]:
    """What a validated recipe needs on the mesh that it names; no device is asked for and nothing is allocated.

    Returns:
        `parameters` (numbers: total, indexers, active, trainable by stage), `flops_per_token` by sequence length,
        `cache_bytes_per_token` by dtype, `stages` (bytes per device of those that the recipe runs), `parameter_bytes` per
        device, `sharding` (a row per parameter).

    Raises:
        ConfigError: when something does not divide over the mesh, or a stage is to train weights in fp8.
    """
    check_layout(config)
    model = build_model(config.model)
    params = abstract_params(model)
    sizes, has_indexer = config.parallel.sizes(), config.model.attention.indexer.enabled
    count = lambda rule: count_parameters(split_parameters(params, rule)[0])
    active = active_weights(config.model)
    stages = {name: stage_of(config, name) for name in STAGE_ORDER}
    run = [name for name in STAGE_ORDER if getattr(config.train, name).steps]
    modes = ATTENTIONS if has_indexer else ATTENTIONS[:1]
    lengths = sorted({getattr(config.train, name).longest for name in run} | {config.model.max_positions})
    return {
        "name": config.name,
        "mesh": {axis: size for axis, size in sizes.items() if size > 1},
        "n_devices": math.prod(sizes.values()),
        "parameters": {
            "total": count_parameters(params),
            "indexers": count(is_indexer_path),
            "active": round(active.model + active.indexers),
            "trainable": {name: count(stage.trains) for name, stage in stages.items() if has_indexer or not stage.indexer_loss},
        },
        "flops_per_token": {
            length: {
                "forward": {mode: forward_flops_per_token(config.model, length, mode) for mode in modes},
                "training": {mode: training_flops_per_token(config.model, length, mode) for mode in modes},
            }
            for length in lengths
        },
        "cache_bytes_per_token": {
            dtype: {mode: cache_bytes_per_token(config.model, dtype, mode) for mode in modes} for dtype in CACHE_DTYPES
        },
        "parameter_bytes": bytes_per_device(params, sizes),
        "stages": {name: _stage_bytes(config, model, params, name) for name in run},
        "sharding": sharding_table(params, sizes),
    }


def _stage_bytes(config: Config, model: Transformer, params: dict[str, Any], name: str) -> dict[str, Any]:
    """Bytes per device of a training step, apart from the parameters."""
    config.model.check_trainable()
    stage, settings, sizes = stage_of(config, name), getattr(config.train, name), config.parallel.sizes()
    state = jax.eval_shape(lambda params: init_state(params, stage, settings), params)
    trainable = split_parameters(params, stage.trains)[0]
    gradients = bytes_per_device(trainable, sizes)
    if settings.accumulation > 1:  # a float32 sum beside the gradient of the micro-batch
        wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float32"), trainable)
        gradients += bytes_per_device(wide, sizes)
    activations = estimate_activations(config, model, params, stage)
    optimizer = bytes_per_device(state.opt_state, sizes)
    return {
        "rows": settings.batch_size // settings.accumulation,
        "accumulation": settings.accumulation,
        "seq_len": settings.longest,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": {**activations._asdict(), "total": activations.total},
        "total": bytes_per_device(params, sizes) + optimizer + gradients + activations.total,
    }
