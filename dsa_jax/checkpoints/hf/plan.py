"""The plan of loading: the tensors that fill each parameter, all checked before the first weight is read."""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.config_fields import Fields
from dsa_jax.checkpoints.hf.finite import as_finite
from dsa_jax.checkpoints.hf.fp8 import SCALE_SUFFIX, check_grid, dequantize_on_host
from dsa_jax.checkpoints.hf.names import EMBEDDING, HEAD, pieces, tensor_name
from dsa_jax.checkpoints.hf.safetensors_file import DTYPES, TensorInfo
from dsa_jax.checkpoints.hf.weights import INDEX_FILE, Weights
from dsa_jax.config.attention import SHARED
from dsa_jax.config.model import ModelConfig
from dsa_jax.foreign import printable
from pallas_kernels.quantize import quantize_blocks
from pallas_kernels.quantize.blocks import WEIGHT_BLOCK

_LOG = logging.getLogger(__name__)
_FLOATS = ("F64", "F32", "BF16", "F16")
_FP8 = ("F8_E4M3",)
_MOST_SHOWN = 5
_PART_BYTES = 16 * 2**20
_quantize = jax.jit(quantize_blocks)


class Source(NamedTuple):
    """A tensor or the part `[*lead, rows]` of it, and the part `place` of a parameter that it fills."""

    name: str
    place: tuple[int, ...]
    transpose: bool
    lead: tuple[int, ...] = ()
    rows: slice | None = None


def plan_sources(
    config: ModelConfig, shapes: Mapping[str, Any], weights: Weights, *, block: tuple[int, int], n_mtp_layers: int
) -> dict[str, list[Source]]:
    """The sources of every parameter in `shapes` (anything with a `shape`, by path).

    Raises:
        CheckpointError: listing tensors that are missing, of another shape or of a type that holds no weights, and those that
            no parameter takes.
    """
    plan: dict[str, list[Source]] = {}
    used: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        transpose = tensor_name(config, path).transpose
        plan[path] = []
        for piece in pieces(config, path):
            shape = leaf.shape[len(piece.place) :]
            shape = tuple(reversed(shape)) if transpose else tuple(shape)
            source, whole = _source(piece.name, piece.place, transpose, shape, leaf.shape, weights.tensors)
            plan[path].append(source)
            used[source.name] = whole
    _check_present(used, weights)
    _check_kinds(used, weights, block)
    _check_left_over(used, config, weights, n_mtp_layers)
    return plan


class BlockPart(NamedTuple):
    """Some rows of a tensor in fp8 blocks with their scales, and the place of both in the whole."""

    rows: slice
    values: Shaped[np.ndarray, "..."]
    block_rows: slice
    scales: Shaped[np.ndarray, "..."]


def read_blocks(source: Source, weights: Weights) -> Iterator[BlockPart]:
    """A source in fp8 blocks of 128 x 128: whole, as stored, or quantised here, in parts.

    Raises:
        CheckpointError: for a weight or a scale that is not finite.
    """
    scale_name = source.name + SCALE_SUFFIX
    step = WEIGHT_BLOCK[0]
    if scale_name in weights.tensors:
        rows = source.rows or slice(None)
        block_rows = slice(rows.start // step, -(-rows.stop // step)) if source.rows else None
        values = _finite_part(source.name, weights, source.lead, source.rows)
        scales = _finite_part(scale_name, weights, source.lead, block_rows, np.float32)
        yield BlockPart(slice(0, len(values)), values, slice(0, len(scales)), scales)
        return
    for rows, value in read_source(source, weights, WEIGHT_BLOCK, np.dtype(np.float32), multiple=step):
        values, scales = map(np.asarray, _quantize(value))
        yield BlockPart(rows, values, slice(rows.start // step, rows.start // step + len(scales)), scales)


def read_source(
    source: Source, weights: Weights, block: tuple[int, int], dtype: np.dtype, *, multiple: int = 1
) -> Iterator[tuple[slice, Shaped[np.ndarray, "..."]]]:
    """A source in parts of a few megabytes: (rows of the part, values in `dtype`).

    A quantised tensor comes whole, dequantised. All parts but the last have a multiple of `multiple` rows.

    Raises:
        CheckpointError: for a weight that is not finite, or not in `dtype`.
    """
    scale_name = source.name + SCALE_SUFFIX
    info = weights.tensors[source.name]
    if scale_name in weights.tensors:
        quantized = weights.read(source.name, lead=source.lead)
        value = dequantize_on_host(quantized, weights.read(scale_name, lead=source.lead), block, dtype)
        first = (*source.lead, source.rows.start if source.rows else 0)
        value = as_finite(value if source.rows is None else value[source.rows], dtype, source.name, info, first)
        yield slice(0, len(value)), value
        return
    shape = info.shape[len(source.lead) :]
    start_row, stop, _ = (source.rows or slice(None)).indices(shape[0])
    row_bytes = math.prod(shape[1:]) * DTYPES[info.dtype].itemsize
    step = max(1, _PART_BYTES // max(row_bytes * multiple, 1)) * multiple
    for start in range(start_row, stop, step):
        rows = slice(start, min(start + step, stop))
        yield slice(rows.start - start_row, rows.stop - start_row), _finite_part(source.name, weights, source.lead, rows, dtype)


def _finite_part(
    name: str, weights: Weights, lead: tuple[int, ...], rows: slice | None, dtype: Any = None
) -> Shaped[np.ndarray, "..."]:
    """The part `[*lead, rows]` of a tensor, in `dtype` or as stored, once it is known to be finite."""
    value = weights.read(name, lead=lead, rows=rows)
    return as_finite(value, dtype or value.dtype, name, weights.tensors[name], (*lead, rows.start if rows else 0))


def _source(
    name: str,
    place: tuple[int, ...],
    transpose: bool,
    shape: tuple[int, ...],
    stacked: tuple[int, ...],
    tensors: Mapping[str, TensorInfo],
) -> tuple[Source, tuple[int, ...]]:
    """The source of one piece and the shape its whole tensor must have; experts may be fused into one tensor per layer."""
    if name in tensors or len(place) < 2:
        return Source(name, place, transpose), shape
    expert, n_experts = place[1], stacked[1]
    prefix, projection = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name).groups()  # type: ignore[union-attr]
    fused = f"{prefix}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"
    if fused not in tensors:
        return Source(name, place, transpose), shape
    if projection == "down_proj":
        return Source(fused, place, transpose, (expert,)), (n_experts, *shape)
    first = 0 if projection == "gate_proj" else shape[0]
    rows = slice(first, first + shape[0])
    return Source(fused, place, transpose, (expert,), rows), (n_experts, 2 * shape[0], shape[1])


def _check_present(used: Mapping[str, tuple[int, ...]], weights: Weights) -> None:
    if unlisted := sorted(used.keys() & weights.unlisted):
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        raise CheckpointError(
            f"{weights.tensors[unlisted[0]].file} holds {unlisted[0]}{more}, which {INDEX_FILE} does not list. Get the index "
            "and the files it names from one revision."
        )
    missing = [name for name in used if name not in weights.tensors]
    if missing:
        hint = "The checkpoint is incomplete, or config.json is that of another model."
        if any(".indexer." in name for name in missing):
            hint = "A checkpoint without an indexer must not declare one in config.json; pass `indexer` to add a new one."
        raise CheckpointError(f"{weights.directory} lacks {_shown(f'{name} {list(used[name])}' for name in missing)}. {hint}")
    wrong = [name for name, shape in used.items() if weights.tensors[name].shape != shape]
    if wrong:
        shown = _shown(f"{name} with shape {list(weights.tensors[name].shape)}, expected {list(used[name])}" for name in wrong)
        raise CheckpointError(
            f"{weights.tensors[wrong[0]].file} holds {shown}. The weights do not fit {weights.directory / 'config.json'}: get "
            "both from the same source."
        )


def _check_kinds(used: Mapping[str, tuple[int, ...]], weights: Weights, block: tuple[int, int]) -> None:
    for name, shape in used.items():
        info, scale = weights.tensors[name], weights.tensors.get(name + SCALE_SUFFIX)
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file}: {name} has dtype {printable(info.dtype)}; expected one of {', '.join(DTYPES)}. Convert it."
            )
        if scale is None and info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{info.file}: {name} is of type {info.dtype} and has no {name}{SCALE_SUFFIX} beside it; expected one of "
                f"{', '.join(_FLOATS)}, or F8_E4M3 with scales per block."
            )
        if scale is not None:
            if info.dtype not in _FP8 or scale.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{info.file}: {name} is of type {info.dtype} with scales of type {printable(scale.dtype)}; expected "
                    "F8_E4M3 with F32."
                )
            check_grid(name, shape, scale.shape, block, (info.file, scale.file))


def check_blocks(sources: Iterable[Source], weights: Weights, block: tuple[int, int]) -> None:
    """Make sure that what is stored in fp8 can stay as it is.

    Raises:
        CheckpointError: for blocks of another size than 128 x 128, or a projection that begins inside one.
    """
    for source in sources:
        info = weights.tensors[source.name]
        if source.name + SCALE_SUFFIX not in weights.tensors:
            continue
        if block != WEIGHT_BLOCK:
            raise CheckpointError(
                f"{info.file}: {source.name} has scales per block of {block[0]} x {block[1]}; weight_format fp8_blocks keeps "
                f"blocks of {WEIGHT_BLOCK[0]} x {WEIGHT_BLOCK[1]}. Load with weight_format plain."
            )
        if source.rows is not None and source.rows.start % WEIGHT_BLOCK[0]:
            raise CheckpointError(
                f"{info.file}: {source.name} holds two projections fused, and the second begins at row {source.rows.start}, "
                "inside a block of fp8 weights: weight_format fp8_blocks cannot part them. Load with weight_format plain."
            )


def _check_left_over(used: Mapping[str, tuple[int, ...]], config: ModelConfig, weights: Weights, n_mtp_layers: int) -> None:
    """Refuse tensors that no parameter takes, but for multi-token-prediction layers, indexers of layers that reuse a selection,
    buffers, empty tensors (of no shared experts) and the copy of a tied head.
    """
    shares = [layer.role == SHARED for layer in config.attention.layers(config.n_layers)]
    skipped: dict[int, int] = {}
    spare: set[int] = set()
    extra = []
    for name in weights.tensors:
        base = name.removesuffix(SCALE_SUFFIX)
        layer = re.match(r"model\.layers\.(\d{1,9})\.(self_attn\.indexer\.)?", name)
        index = int(layer[1]) if layer else -1
        if base in used or name.endswith("rotary_emb.inv_freq") or 0 in weights.tensors[name].shape:
            continue
        if config.n_layers <= index < config.n_layers + n_mtp_layers:
            skipped[index] = skipped.get(index, 0) + 1
        elif layer and layer[2] and index < config.n_layers and shares[index]:
            spare.add(index)
        elif name == HEAD and config.tie_embeddings:
            _LOG.info("%s: the head is tied to %s, its own copy %s is not read", weights.directory, EMBEDDING, HEAD)
        else:
            extra.append(name)
    if skipped:
        _LOG.info(
            "%s: skipped %d tensors of %d multi-token-prediction layers", weights.directory, sum(skipped.values()), len(skipped)
        )
    if spare:
        listed = ", ".join(map(str, sorted(spare)))
        _LOG.info("%s: layers %s reuse a selection by config.json; their own indexers are not read", weights.directory, listed)
    if extra:
        file = weights.tensors[sorted(extra)[0]].file
        shown = _shown(f"{name} {list(weights.tensors[name].shape)}" for name in sorted(extra))
        raise CheckpointError(
            f"{file} holds {shown}, which the model of {weights.directory / 'config.json'} has no use for. config.json is that "
            "of another model, or lacks a field."
        )


def describe_rounding(plan: Mapping[str, list[Source]], shapes: Mapping[str, Any], weights: Weights) -> None:
    """Log the tensors that lose precision because the parameters are narrower."""
    rounded = [
        source.name
        for path, sources in plan.items()
        for source in sources
        if DTYPES[weights.tensors[source.name].dtype].itemsize > np.dtype(shapes[path].dtype).itemsize
    ]
    if rounded:
        _LOG.info("%s: rounded %s to the type of the parameters", weights.directory, _shown(rounded))


def count_mtp_layers(content: Mapping[str, Any], file: Path) -> int:
    """Number of layers after the last one that may be multi-token-prediction layers: at least one."""
    fields = Fields(file, dict(content), {})
    stated = [fields.whole(name, least=0) for name in ("num_nextn_predict_layers", "num_mtp_layers") if fields.has(name)]
    return max(stated[0], 1) if stated else 1


def _shown(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_SHOWN} more" if len(listed) > _MOST_SHOWN else ""
    return ", ".join(map(printable, listed[:_MOST_SHOWN])) + more
