"""Loading a Hugging Face checkpoint, one stacked parameter at a time."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.families import FAMILIES
from dsa_jax.checkpoints.hf.fp8 import block_size
from dsa_jax.checkpoints.hf.index_rope import from_stored, is_reordered
from dsa_jax.checkpoints.hf.plan import (
    Source,
    check_blocks,
    count_mtp_layers,
    describe_rounding,
    plan_sources,
    read_blocks,
    read_source,
)
from dsa_jax.checkpoints.hf.read_config import read_model_config, stated_dtype
from dsa_jax.checkpoints.hf.tokenizer_files import load_checkpoint_tokenizer
from dsa_jax.checkpoints.hf.weights import Weights, read_json
from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config.attention import AttentionConfig, AttentionLayer, IndexerConfig, extended
from dsa_jax.config.checks import ConfigError
from dsa_jax.config.model import FP8_BLOCKS, PLAIN, ModelConfig
from dsa_jax.model import Transformer, abstract_params, build_model, init_params
from dsa_jax.model.attention.kinds import is_optional
from dsa_jax.parallel.placement import placement_on, shard
from dsa_jax.parallel.rules import check_divisible
from dsa_jax.params import (
    BLOCK_SCALES,
    is_block_scales_path,
    is_indexer_path,
    nested_parameters,
    parameter_paths,
    split_parameters,
)

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 64  # what JAX needs to adopt an array of the host without a copy

Placement = Callable[[str], jax.sharding.Sharding]


def load_pretrained(
    directory: str | Path,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    attention: str | None = None,
    indexer: IndexerConfig | None = None,
    layer_types: tuple[str, ...] = (),
    extended_by: AttentionConfig | None = None,
    seed: int = 0,
    placement: Placement | None = None,
    weight_format: str = PLAIN,
) -> Pretrained:
    """The model, parameters and tokenizer of a checkpoint directory.

    Weights are read in parts into the stacked parameter they belong to, which is then placed on the devices: beside the model
    itself the host holds one stacked parameter and a few megabytes.

    Args:
        directory: holds config.json and model.safetensors, or model.safetensors.index.json with the files it names.
        dtype: "float32" or "bfloat16", of parameters and activations; None is as stored, where float16 becomes float32 and
            fp8 becomes bfloat16. Norms, routers and the indexer's key norm are float32 always.
        mesh: every parameter is sharded over its axes "fsdp", "expert" and "tensor" (by dsa_jax/parallel/rules.py) and
            replicated over others, unless `placement` says otherwise. Axes are taken as Auto.
        attention: "dense" or "sparse"; None is as the checkpoint was trained.
        indexer: added to a checkpoint without one, with new parameters drawn from `seed`, which are logged. The mode stays
            dense unless `attention` says otherwise. A checkpoint that has indexers must have just these.
        layer_types: of `AttentionConfig`, with the indexer: which layers share one. Empty is as the checkpoint has them.
        extended_by: attention whose kind extends the checkpoint's by a mode of its own; its parameters are added likewise.
        seed: the new parameters are those that `init_params` draws from `jax.random.key(seed)`.
        placement: from a parameter's path to its sharding.
        weight_format: "plain" dequantises fp8 weights to `dtype`. "fp8_blocks" keeps the kernels that DeepSeek publishes in
            fp8 (all but head and router) as e4m3 with a scale per block of 128 x 128, bit for bit where the checkpoint has
            them so, else quantised here with power-of-two scales; for serving and evaluation.

    Raises:
        CheckpointError: when the directory cannot be read or does not fit its config.json, as with a missing weight, or holds
            one that is NaN or infinite.
        ConfigError: when `attention`, `indexer`, `dtype` or `weight_format` cannot work with the model, or `mesh` does not
            divide a parameter.
    """
    directory = Path(directory)
    config = read_model_config(directory)
    content = read_json(directory / "config.json")
    if dtype is not None:
        try:
            config.param_dtype = config.dtype = jnp.dtype(dtype).name
        except TypeError:
            raise ConfigError(f"dtype is {dtype!r}; expected 'float32' or 'bfloat16'.") from None
    config.weight_format = weight_format
    _say_what_is_converted(directory, content, config)
    brings_indexer = config.attention.indexer.enabled
    if indexer is not None:
        _attach(config, indexer, layer_types, directory)
    if extended_by is not None:
        config.attention = extended(config.attention, extended_by)
    if attention is not None:
        config.attention.mode = attention
    model = build_model(config)
    abstract = abstract_params(model)
    where = placement
    if mesh is not None and placement is None:
        check_divisible(abstract, mesh.shape)
        where = placement_on(_with_auto_axes(mesh))
    shapes = parameter_paths(abstract)
    added = [path for path in shapes if is_optional(path) and not (is_indexer_path(path) and brings_indexer)]
    tokenizer = load_checkpoint_tokenizer(directory, content, config.vocab_size)
    stored = {path: leaf for path, leaf in shapes.items() if path not in added}
    loaded = _read_parameters(directory, content, config, stored, where)
    if added:
        loaded |= {path: _put(value, path, where) for path, value in _new_parameters(model, seed, added).items()}
        missing = "no indexer" if any(map(is_indexer_path, added)) else f"not all of attention kind {config.attention.kind!r}"
        _LOG.info("%s has %s; new parameters from seed %d: %s", directory, missing, seed, ", ".join(added))
    return Pretrained(config, model, nested_parameters({path: loaded[path] for path in shapes}), tokenizer)


def _read_parameters(
    directory: Path, content: dict[str, Any], config: ModelConfig, shapes: dict[str, Any], where: Placement | None
) -> dict[str, jax.Array]:
    block = block_size(content, directory / "config.json")
    family = FAMILIES.get(content["model_type"])
    n_mtp_layers = count_mtp_layers(content, directory / "config.json") if family and family.mtp_layers else 0
    loaded: dict[str, jax.Array] = {}
    reordered = is_reordered(config, content["model_type"], bool(content.get("indexer_rope_interleave", True)))
    in_order = functools.partial(from_stored, config) if reordered else lambda path, value: value
    with Weights(directory) as weights:
        if not weights.tensors:
            raise CheckpointError(f"{directory} holds no tensors in its weight files. Download it again.")
        kernels = {path: leaf for path, leaf in shapes.items() if not is_block_scales_path(path)}
        plan = plan_sources(config, kernels, weights, block=block, n_mtp_layers=n_mtp_layers)
        describe_rounding(plan, shapes, weights)
        scales_of = {path: path.removesuffix("kernel") + BLOCK_SCALES for path in plan}
        kept = {path: scales for path, scales in scales_of.items() if scales in shapes}
        check_blocks([source for path in kept for source in plan[path]], weights, block)
        for path, sources in plan.items():
            if path in kept:
                names = path, kept[path]
                values, scales = _stacked_blocks(sources, shapes[path], shapes[kept[path]], weights)
                both = in_order(path, values), scales
                loaded |= {name: _put(value, name, where) for name, value in zip(names, both, strict=True)}
            else:
                loaded[path] = _put(in_order(path, _stacked(sources, shapes[path], weights, block)), path, where)
    return loaded


def _stacked(sources: list[Source], leaf: Any, weights: Weights, block: tuple[int, int]) -> Shaped[np.ndarray, "..."]:
    out = _aligned_empty(leaf.shape, np.dtype(leaf.dtype))
    for source in sources:
        for rows, value in read_source(source, weights, block, out.dtype):
            _fill(out, source, rows, value)
    return out


def _stacked_blocks(
    sources: list[Source], leaf: Any, scales_leaf: Any, weights: Weights
) -> tuple[Shaped[np.ndarray, "..."], Shaped[np.ndarray, "..."]]:
    """(e4m3 kernel, block scales) of a stacked parameter."""
    values, scales = (_aligned_empty(each.shape, np.dtype(each.dtype)) for each in (leaf, scales_leaf))
    for source in sources:
        for part in read_blocks(source, weights):
            _fill(values, source, part.rows, part.values)
            _fill(scales, source, part.block_rows, part.scales)
    return values, scales


def _fill(out: Shaped[np.ndarray, "..."], source: Source, rows: slice, value: Shaped[np.ndarray, "..."]) -> None:
    """Write `rows` of the tensor that `source` names, in the parameter's type, to their place in it."""
    target = (out[source.place].T if source.transpose else out[source.place])[rows]
    # As plain integers, which numpy copies several times as fast as bfloat16.
    plain = np.dtype(f"u{out.dtype.itemsize}")
    target.view(plain)[...] = value.view(plain)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    n_bytes = math.prod(shape) * dtype.itemsize
    room = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    first = -room.ctypes.data % _ALIGNMENT
    return room[first : first + n_bytes].view(dtype).reshape(shape)


def _with_auto_axes(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    # The axes of `jax.make_mesh` are Explicit unless one asks; the model leaves it to the compiler how to split.
    axis_types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=axis_types)


def _put(value: Any, path: str, where: Placement | None) -> jax.Array:
    return jax.device_put(value) if where is None else shard(value, where(path))


def _attach(config: ModelConfig, indexer: IndexerConfig, layer_types: tuple[str, ...], directory: Path) -> None:
    asked = dataclasses.replace(config.attention, indexer=dataclasses.replace(indexer, enabled=True))
    asked.layer_types = layer_types or config.attention.layer_types
    if config.attention.indexer.enabled:
        if _as_computed(config.attention, config) != _as_computed(asked, config):
            raise CheckpointError(
                f"{directory} has indexers of its own, {config.attention.indexer}; expected just these, got {indexer}. Leave "
                "`indexer` out."
            )
        return
    config.attention = asked


def _as_computed(attention: AttentionConfig, config: ModelConfig) -> tuple[IndexerConfig, tuple[AttentionLayer, ...]]:
    """The indexer without the settings that only training reads, and the roles of the layers."""
    plain = IndexerConfig()
    unread = {name: getattr(plain, name) for name in ("coarse_loss_weight", "distill_shared")}
    return dataclasses.replace(attention.indexer, **unread), attention.layers(config.n_layers)


def _new_parameters(model: Transformer, seed: int, paths: Sequence[str]) -> dict[str, jax.Array]:
    """The parameters at `paths` that `init_params` would draw; compiled together, the others are never computed."""
    draw = jax.jit(lambda key: split_parameters(init_params(model, key), set(paths).__contains__)[0])
    return parameter_paths(draw(jax.random.key(seed)))


def _say_what_is_converted(directory: Path, content: dict[str, Any], config: ModelConfig) -> None:
    stated = stated_dtype(content) or ""
    if config.weight_format == FP8_BLOCKS:
        _LOG.info("%s: kernels are kept in fp8 blocks; activations are not quantised", directory)
    elif content.get("quantization_config"):
        _LOG.info("%s: fp8 weights become %s; activations are not quantised", directory, config.param_dtype)
    elif stated in ("float16", "half"):
        _LOG.info("%s: float16 weights become %s", directory, config.param_dtype)
