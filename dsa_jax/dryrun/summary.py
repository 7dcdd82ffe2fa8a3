"""Summary of a recipe's needs that follow from shapes alone: as JSON values, and as text."""

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
from dsa_jax.dryrun.memory import bytes_per_device, estimate_activations, sharding_table
from dsa_jax.model import Transformer, abstract_params, build_model
from dsa_jax.parallel.check import check_layout
from dsa_jax.params import BLOCK_SCALES, count_parameters, is_indexer_path, split_parameters
from dsa_jax.train.stages import stage_of
from dsa_jax.train.step import init_state

GB = 1e9


def summarize(config: Config) -> dict[str, Any]:
    """Needs of a validated recipe on the mesh that it names; no device is asked for and nothing is allocated.

    Returns:
        `parameters` (numbers: total, indexers, active, trainable by stage), `flops_per_token` by sequence length,
        `cache_bytes_per_token` by dtype, `stages` (bytes per device of those that the recipe runs), `parameter_bytes` per
        device, `sharding` (a row per parameter).

    Raises:
        ConfigError: when something does not divide over the mesh, or a stage is to train weights in fp8.
    """
    check_layout(config)
    config = config.laid_out()
    model = build_model(config.model)
    params = abstract_params(model)
    sizes, has_indexer = config.parallel.sizes(), config.model.attention.indexer.enabled
    count = lambda rule: count_parameters(split_parameters(params, rule)[0])
    active = active_weights(config.model)
    stages = {name: stage_of(config, name) for name in STAGE_ORDER}
    run = [name for name in STAGE_ORDER if getattr(config.train, name).n_steps]
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


def format_summary(summary: dict[str, Any], device_bytes: float) -> str:
    """The summary as aligned text; `device_bytes` is the memory that each device has."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in summary["mesh"].items()) or "one device"
    lines = [f"{summary['name']} on {mesh}; nothing is allocated", "", *_parameters(summary["parameters"])]
    lines += ["", f"{'GFLOP per token, mean over the sequence':44}{'forward':>12}{'training':>12}"]
    for length, flops in summary["flops_per_token"].items():
        for mode in flops["forward"]:
            cells = "".join(f"{flops[phase][mode] / 1e9:12,.1f}" for phase in ("forward", "training"))
            lines.append(f"  {f'{mode}, {length:,} tokens':42}{cells}")
    lines += ["", f"{'cache, bytes per token':44}{'dense':>12}{'sparse':>12}"]
    for dtype, sizes in summary["cache_bytes_per_token"].items():
        lines.append(f"  {dtype:42}" + "".join(f"{size:12,.0f}" for size in sizes.values()))
    lines += ["", *_memory(summary, device_bytes), "", *_sharding(summary["sharding"])]
    return "\n".join(lines)


def _parameters(numbers: dict[str, Any]) -> list[str]:
    row = lambda name, n: f"{name:38}{n:18,}"
    lines = [row("parameters", numbers["total"]), row("  of them in indexers", numbers["indexers"])]
    lines.append(row("  active: a token multiplies with", numbers["active"]))
    return lines + [row(f"  trainable in {stage}", n) for stage, n in numbers["trainable"].items()]


def _memory(summary: dict[str, Any], device_bytes: float) -> list[str]:
    parameters = summary["parameter_bytes"]
    if not summary["stages"]:
        serves = any(row["path"].endswith(BLOCK_SCALES) for row in summary["sharding"])
        how = " and --config.model.weight_format=plain" if serves else ""
        return [
            f"{'GB per device':44}",
            f"  {'parameters':42}{parameters / GB:12.2f}",
            f"  no stage has steps: set --config.train.sparse.steps=1, its batch_size and seq_len{how} to see a training step",
        ]
    columns = summary["stages"].values()
    row = lambda name, values: f"  {name:42}" + "".join(f"{value / GB:12.2f}" for value in values)
    lines = [
        f"{'GB per device':44}" + "".join(f"{name:>12}" for name in summary["stages"]),
        f"  {'rows x tokens of a micro-batch, all devices':42}"
        + "".join(f"{'{} x {}'.format(stage['rows'], stage['seq_len']):>12}" for stage in columns),
        row("parameters", [parameters] * len(columns)),
        row("optimizer state", [stage["optimizer"] for stage in columns]),
        row("gradients", [stage["gradients"] for stage in columns]),
        row("saved by all layers for the backward pass", [stage["activations"]["saved"] for stage in columns]),
        row("backward pass of the costliest layer", [stage["activations"]["layer"] for stage in columns]),
        row("its weights gathered, and their gradient", [stage["activations"]["weights"] for stage in columns]),
        row("or: a chunk of logits", [stage["activations"]["logits"] for stage in columns]),
        row("together, an estimate", [stage["total"] for stage in columns]),
    ]
    too_big = [name for name, stage in summary["stages"].items() if stage["total"] > device_bytes]
    verdict = f"DOES NOT FIT: {', '.join(too_big)}" if too_big else "fits"
    return [*lines, f"  in {device_bytes / GB:g} GB: {verdict}", *_HOW]


_HOW = (
    "  Activations are estimates: the residuals that jax.vjp of one traced layer keeps for its backward pass, under the",
    "  recipe's model.remat (times layers) and without it (one layer). Results that the compiler fuses are counted; the",
    "  workspace of an operation, and temporaries of a frozen layer, are not. --compile or --target asks the compiler instead.",
)


def _sharding(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["path"]) for row in rows)
    lines = [f"{'parameter':{width}}  {'shape':>22}  {'dtype':13}  {'split over':30}  {'MB per device':>13}"]
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        spec = ", ".join(axis or "-" for axis in row["spec"]) if any(row["spec"]) else "all have it"
        lines.append(f"{row['path']:{width}}  {shape:>22}  {row['dtype']:13}  {spec:30}  {row['bytes'] / 1e6:13,.1f}")
    return lines
