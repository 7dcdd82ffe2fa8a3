"""Saving a Hugging Face checkpoint: one tensor in memory at a time, and the directory complete or unchanged."""

import contextlib
import dataclasses
import errno
import functools
import glob
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.families import FAMILIES, Family
from dsa_jax.checkpoints.hf.index_rope import is_reordered, to_stored
from dsa_jax.checkpoints.hf.names import pieces, tensor_name
from dsa_jax.checkpoints.hf.safetensors_file import TensorToWrite, write_file
from dsa_jax.checkpoints.hf.tokenizer_files import (
    BYTES_FIELD,
    TOKENIZER_FILES,
    end_tokens,
    has_tokenizer_files,
    stated_end_tokens,
    tokenizer_files,
)
from dsa_jax.checkpoints.hf.weights import INDEX_FILE, SINGLE_FILE, read_json
from dsa_jax.checkpoints.hf.write_config import Layout, choose_layout
from dsa_jax.config.model import FP8_BLOCKS, ModelConfig
from dsa_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from dsa_jax.model import abstract_params, build_model, layer_stacks
from dsa_jax.params import is_block_scales_path, parameter_paths
from dsa_jax.run.files import exchange
from dsa_jax.run.signed import is_signed

_LOG = logging.getLogger(__name__)
_METADATA = {"format": "pt"}
TEXT_RECORD = "dsa_jax_text.json"
"""File beside the weights that says which text they were evaluated on."""
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Files of a checkpoint directory beside its weights, which saving may replace.
_REPLACEABLE = frozenset({"config.json", INDEX_FILE, *TOKENIZER_FILES, TEXT_RECORD, "README.md", "LICENSE", ".gitattributes"})


def save_pretrained(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    shard_bytes: int = 5 * 2**30,
    before_replacing: Callable[[Path], None] = lambda complete: None,
) -> None:
    """Write config.json, the weights and the tokenizer's files; `load_pretrained` gives the same bits back.

    Latent attention with an indexer becomes a deepseek_v32 checkpoint, or a glm_moe_dsa one where it came from there, rotates
    the indexer interleaved or shares selections; transformers, vLLM and SGLang know both. A half-split indexer is written to
    glm_moe_dsa with its channels interleaved, as its readers expect. Where that cannot express the model, and for grouped-query
    attention, the model keeps its family, with `self_attn.indexer.*` tensors and `index_*` fields added: programs other than
    this project then run it dense. What no family computes gets a model_type of this project. The log says which.

    Weights are stored as `config.param_dtype`, selection biases and the indexer's key norm as float32. Other norms and
    routers, which are float32 here, are stored as `param_dtype` if that loses nothing and else as float32. Kernels in fp8
    blocks are stored unchanged, each with its `weight_scale_inv`, as DeepSeek publishes them.

    Args:
        directory: new, empty, or a checkpoint, which is replaced in one step once the new one is complete: whenever the process
            is killed, one of both is there, whole. A README.md that somebody wrote or edited stays in it.
        config: the model.
        params: its parameters, of the shapes and types that `init_params` gives.
        tokenizer: one of ours, or the path of a directory or of the file of a tokenizer; its files are copied, and its end
            tokens are written beside the model's own.
        shard_bytes: most bytes of tensors in one file, unless a single tensor has more.
        before_replacing: called with the complete new directory before it takes its place; what it raises leaves all as it was.

    Raises:
        CheckpointError: when the parameters do not fit the config, no format holds the model (`choose_layout`), or the
            directory cannot be written; it is then unchanged.
    """
    target = Path(directory).resolve()
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ValueError(f"shard_bytes is {shard_bytes!r}; expected a positive number of bytes, such as 5 * 2**30.")
    leaves = _checked_leaves(config, params)
    _check_target(target)
    source = _tokenizer_source(tokenizer)
    carried = tokenizer_files(source) if source else {}
    config = _with_end_tokens(
        config, [tokenizer.end_of_text_id] if isinstance(tokenizer, ByteTokenizer) else end_tokens(carried)
    )
    layout = choose_layout(config)
    if is_reordered(config, layout.model_type):
        leaves = {path: to_stored(config, path, leaf) for path, leaf in leaves.items()}
    tensors = _tensors(config, leaves) + _zero_biases(config, FAMILIES.get(layout.model_type))
    content = dict(layout.content)
    if config.weight_format == FP8_BLOCKS and _are_powers_of_two(leaves):
        content["quantization_config"] = content["quantization_config"] | {"scale_fmt": "ue8m0"}
    if isinstance(tokenizer, ByteTokenizer):
        content[BYTES_FIELD] = "bytes"
    try:
        temporary = _beside(target, "part")
        temporary.mkdir(parents=True)
        try:
            _write_weights(temporary, tensors, shard_bytes)
            for name, file in carried.items():
                shutil.copyfile(file, temporary / name)
            _state_end_tokens(temporary / "generation_config.json", config)
            _write_json(temporary / "config.json", content)
            _keep_card(target, temporary)
            _sync(temporary)
            before_replacing(temporary)
            _replace(temporary, target)
            _remove_leftovers(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise CheckpointError(
            f"{target} cannot be written: {reason}. What was there before is untouched; free space or choose another directory."
        ) from error
    _LOG.info("wrote %s: %d tensors%s", target, len(tensors), f", {', '.join(carried)}" if carried else "")
    _say_who_can_read(target, config, layout)


def _checked_leaves(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by path, each of the shape and type that the config asks for."""
    model = build_model(config)
    expected = parameter_paths(abstract_params(model))
    leaves = parameter_paths(params)
    problems = [f"{path} is missing" for path in expected if path not in leaves]
    problems += [f"{path} belongs to no part of it" for path in leaves if path not in expected]
    for path, leaf in expected.items():
        if path in leaves:
            given = leaves[path]
            if tuple(given.shape) != tuple(leaf.shape) or given.dtype != leaf.dtype:
                problems.append(f"{path} is {given.dtype} {list(given.shape)}, expected {leaf.dtype} {list(leaf.shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"The parameters do not fit the config: {'; '.join(problems[:5])}{more}.")
    for path, leaf in leaves.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise CheckpointError(f"{path} lies on devices of other processes; gather the parameters before saving.")
    return {path: leaves[path] for path in expected}


def _tensors(config: ModelConfig, leaves: Mapping[str, Any]) -> list[TensorToWrite]:
    """Every tensor of the checkpoint: those outside the layers first, then layer by layer."""
    param_dtype = jnp.dtype(config.param_dtype)
    by_layer: dict[int, list[TensorToWrite]] = {}
    kept_wide = []
    first_layer = {stack.name: stack.first_layer for stack in layer_stacks(config)}
    for path, leaf in leaves.items():
        name = tensor_name(config, path)
        dtype = np.dtype(leaf.dtype)
        if dtype.itemsize > param_dtype.itemsize and not name.float32:
            if _is_exact_in(leaf, param_dtype):
                dtype = np.dtype(param_dtype)
            else:
                kept_wide.append(path)
        fetch = _fetcher(leaf, dtype, name.transpose)
        for piece in pieces(config, path):
            shape = tuple(leaf.shape[len(piece.place) :])
            layer = first_layer[path.split("/", 1)[0]] + piece.place[0] if piece.place else -1
            shape = shape[::-1] if name.transpose else shape
            tensor = TensorToWrite(piece.name, dtype, shape, functools.partial(fetch, piece.place))
            by_layer.setdefault(layer, []).append(tensor)
    if kept_wide:
        _LOG.info("kept in float32, since %s would round them: %s", config.param_dtype, ", ".join(kept_wide))
    return [tensor for layer in sorted(by_layer) for tensor in by_layer[layer]]


def _fetcher(leaf: Any, dtype: np.dtype, transpose: bool) -> Callable[[tuple[int, ...]], Shaped[np.ndarray, "..."]]:
    """A function that brings the part of a parameter at a place to the host; it remembers the last layer of experts."""
    on_host = isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] == ["cpu"]
    source = np.asarray(leaf) if on_host else leaf  # the same memory
    layer = functools.lru_cache(maxsize=1)(lambda index: np.asarray(source[index]))

    def fetch(place: tuple[int, ...]) -> Shaped[np.ndarray, "..."]:
        value = np.asarray(source[place]) if len(place) < 2 else layer(place[0])[place[1:]]
        return np.ascontiguousarray(value.T if transpose else value).astype(dtype, copy=False)

    return fetch


def _are_powers_of_two(leaves: Mapping[str, Any]) -> bool:
    """Whether all block scales are powers of two; readers then expect it of the scales of activations, too."""
    return all((np.frexp(np.asarray(leaf))[0] == 0.5).all() for path, leaf in leaves.items() if is_block_scales_path(path))


def _is_exact_in(leaf: Any, dtype: np.dtype) -> bool:
    value = np.asarray(leaf)
    return bool(np.array_equal(value.astype(dtype).astype(value.dtype), value))


def _zero_biases(config: ModelConfig, family: Family | None) -> list[TensorToWrite]:
    """Selection biases of zero for a router without any, where the family has them."""
    moe = config.moe
    expected = family is not None and family.router is not None and family.router.score_bias
    if not expected or not moe.n_routed_experts or moe.use_score_bias:
        return []
    shape = (moe.n_routed_experts,)
    zeros = lambda: np.zeros(shape, np.float32)
    name = "model.layers.{}.mlp.gate.e_score_correction_bias"
    return [
        TensorToWrite(name.format(layer), np.dtype(np.float32), shape, zeros)
        for layer in range(moe.n_dense_layers, config.n_layers)
    ]


def _write_weights(directory: Path, tensors: list[TensorToWrite], shard_bytes: int) -> None:
    shards: list[list[TensorToWrite]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.n_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.n_bytes
    if len(shards) == 1:
        write_file(directory / SINGLE_FILE, tensors, _METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard, _METADATA)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(tensor.n_bytes for tensor in tensors)
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _with_end_tokens(config: ModelConfig, ends: list[int]) -> ModelConfig:
    """The model with the end tokens of its tokenizer beside its own, as generation here stops at all of them."""
    ours = dict.fromkeys((*config.eos_token_ids, *(token for token in ends if 0 <= token < config.vocab_size)))
    return dataclasses.replace(config, eos_token_ids=tuple(ours))


def _state_end_tokens(file: Path, config: ModelConfig) -> None:
    """Let the generation settings that came with a tokenizer name all end tokens, since other readers prefer these."""
    if not file.is_file():
        return
    settings, ours = read_json(file), list(config.eos_token_ids)
    if ours and set(stated_end_tokens(settings)) != set(ours):
        _write_json(file, settings | {"eos_token_id": ours})


def _tokenizer_source(tokenizer: Tokenizer | str | Path | None) -> Path | None:
    """A directory with files of a tokenizer, or its one file."""
    if tokenizer is None or isinstance(tokenizer, ByteTokenizer):
        return None
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.file
    if isinstance(tokenizer, str | Path):
        path = Path(tokenizer)
        if not (path.is_file() and (path.suffix == ".json" or path.name in TOKENIZER_FILES)) and not has_tokenizer_files(path):
            raise CheckpointError(
                f"tokenizer is {str(tokenizer)!r}; expected a directory with a tokenizer.json or another file of a tokenizer, "
                "or such a file."
            )
        return path
    raise CheckpointError(f"tokenizer is a {type(tokenizer).__name__}; expected a JsonTokenizer, a ByteTokenizer or a path.")


def _check_target(target: Path) -> None:
    """Refuse to replace anything but a checkpoint."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a directory to write a checkpoint to.")
    entries = sorted(target.iterdir())
    of_index = _indexed_files(target)
    weights = [entry for entry in entries if (_WEIGHTS.fullmatch(entry.name) or entry.name in of_index) and not entry.is_dir()]
    if entries and not (weights and (target / "config.json").exists()):
        raise CheckpointError(f"{target} holds {entries[0].name} and is no checkpoint; expected a new or empty directory.")
    others = [entry for entry in entries if entry not in weights and (entry.is_dir() or entry.name not in _REPLACEABLE)]
    if others:
        raise CheckpointError(
            f"{target} is a checkpoint that also holds {others[0].name}, which saving would remove; choose another directory."
        )


def _indexed_files(target: Path) -> set[Any]:
    """Names of the files that the index of a checkpoint lists; empty where there is none that can be read."""
    try:
        files = read_json(target / INDEX_FILE).get("weight_map")
    except CheckpointError:
        return set()
    return {name for name in files.values() if isinstance(name, str)} if isinstance(files, dict) else set()


def _keep_card(target: Path, temporary: Path) -> None:
    """Bring a README.md over that is not, or no more, what we wrote."""
    card = target / "README.md"
    if card.is_file() and not is_signed(card):
        shutil.copyfile(card, temporary / "README.md")
        _LOG.info("%s is kept", card)


def _beside(target: Path, suffix: str) -> Path:
    """A new path next to `target`, of the form that `_remove_leftovers` looks for."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.{suffix}")


def _replace(temporary: Path, target: Path) -> None:
    """Put `temporary` in the place of `target` in one step, so that a process killed at any moment leaves one of them whole."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(temporary, target)
    elif exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        _replace_in_two_steps(temporary, target)
    _sync(target.parent)


def _replace_in_two_steps(temporary: Path, target: Path) -> None:
    """`_replace` where the file system cannot swap names: `target` is moved aside first, and back if the second move fails."""
    aside = _beside(target, "old")
    _LOG.warning("this file system cannot swap directories: killed in the next moment, %s would be %s", target, aside)
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary directories of earlier calls that were killed; what holds other files is somebody's own."""
    for suffix in ("part", "old"):
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.{'[a-z0-9_]' * 8}.{suffix}"):
            with contextlib.suppress(OSError):  # the checkpoint is written already
                if all(file.suffix == ".safetensors" or file.name in _REPLACEABLE for file in leftover.iterdir()):
                    shutil.rmtree(leftover)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _say_who_can_read(target: Path, config: ModelConfig, layout: Layout) -> None:
    family = FAMILIES.get(layout.model_type)
    understood = {"max_positions"}  # others take longer texts, and compute the same
    understood |= {"attention.indexer.rope_layout"} if is_reordered(config, layout.model_type) else set()
    if family is None:
        _LOG.warning("%s: no model family computes what this model does, so only dsa-jax reads it: %s", target, layout.refused)
    elif config.attention.indexer.enabled and family.indexer is None:
        _LOG.warning(
            "%s is a %s checkpoint with indexer tensors: dsa-jax reads them, others refuse or ignore them and run it dense%s",
            target, layout.model_type, f". {layout.refused}" if layout.refused else "",
        )  # fmt: skip
        understood |= {"attention.mode"} if config.attention.mode == "dense" else set()
    selects_blocks = config.attention.mode in ("coarse_to_fine", "blocks")
    shown = ", ".join(
        f"{name} = {value}"
        for name, value in layout.extra.items()
        if name not in understood and (selects_blocks or not name.startswith("attention.indexer.coarse_"))
    )
    if shown:
        _LOG.warning("%s: only dsa-jax honours %s; others compute something else", target, shown)
