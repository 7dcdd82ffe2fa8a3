"""A retrofit that starts from a Hugging Face checkpoint: its model with the recipe's indexer, tokenizer and weights."""

import copy
import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from dsa_jax.checkpoints.hf import load_pretrained, read_model_config, save_pretrained
from dsa_jax.checkpoints.hf.locate import locate_checkpoint
from dsa_jax.checkpoints.hf.read_config import stated_dtype
from dsa_jax.checkpoints.hf.tokenizer_files import has_tokenizer_files, tokenizer_files, tokenizer_name
from dsa_jax.checkpoints.hf.weights import read_json
from dsa_jax.config import Config, ConfigError, ModelConfig, to_dict
from dsa_jax.config.attention import FULL, extended
from dsa_jax.config.fields import flatten
from dsa_jax.config.model import OF_CHECKPOINT
from dsa_jax.config.selections import DENSE
from dsa_jax.costs.indexer_size import paying_heads
from dsa_jax.data import load_tokenizer
from dsa_jax.data.tokenizer import Tokenizer
from dsa_jax.model import Transformer, build_model
from dsa_jax.model.attention.indexer_scale import divided_by_gain
from dsa_jax.parallel.placement import current_mesh
from dsa_jax.params import is_indexer_path, nested_parameters, parameter_paths
from dsa_jax.run.files import write_object
from dsa_jax.run.processes import gather_to_main, on_main

_LOG = logging.getLogger(__name__)

# The recipe decides how the model is computed, the checkpoint what it computes.
_OF_THE_RUN = ("param_dtype", "dtype", "weight_format", "scan_layers", "remat")
CHECKPOINT_TOKENIZER = "checkpoint"


def resolve_checkpoint(config: Config, kept: Path | None = None, *, platform: str | None = None) -> Config:
    """`config` with the model and tokenizer of `init.hf_dir`, and that as a directory; the same config where it is not set.

    The model is the checkpoint's. From the recipe come `model.param_dtype`, `dtype`, `weight_format`, `scan_layers`, `remat`,
    `attention.implementation`, an attention kind that extends the checkpoint's, the experts' balance settings and, where
    the checkpoint has no indexer, `attention.indexer` and `attention.layer_types`. `model.dtype` "checkpoint" becomes the
    checkpoint's, on a CPU float32, since bfloat16 is emulated there; `attention.indexer.n_heads` 0 what `paying_heads` finds
    for `train.sparse`. `platform` is where the model computes, "cpu" or "gpu"; None: where this process does.
    `data.text.tokenizer` "checkpoint" becomes the directory, or "bytes" where the checkpoint says so. Where the directory is
    gone, what `keep_source` wrote to `kept` is read.

    Raises:
        ConfigError: when the recipe asks for the tokenizer of a checkpoint that it does not name, or would train a model that
            has a tokenizer on bytes.
        CheckpointError: when the directory holds no checkpoint that can be read.
    """
    config = copy.deepcopy(config)
    source = present_source(config.init.hf_dir, kept)
    if config.init.hf_dir:
        if source == config.init.hf_dir:
            source = config.init.hf_dir = str(on_main(lambda: locate_checkpoint(config.init.hf_dir)))
        theirs = read_model_config(source)
        if theirs.attention.indexer.enabled and config.model.attention.indexer != theirs.attention.indexer:
            _LOG.info("%s has indexers of its own: model.attention.indexer is taken from there", config.init.hf_dir)
        if config.init.dense_layers:
            config.model.attention.layer_types = _first_dense(config, theirs)
        if config.model.dtype == OF_CHECKPOINT:
            config.model.dtype = "float32" if (platform or jax.default_backend()) == "cpu" else theirs.dtype
        config.model = _merged(config.model, theirs)
        if config.model.attention.indexer.enabled and not config.model.attention.indexer.n_heads:
            config.model.attention.indexer.n_heads = paying_heads(config.model, config.train.sparse.longest)
    if config.data.text.tokenizer == CHECKPOINT_TOKENIZER:
        if not config.init.hf_dir:
            raise ConfigError(
                "data.text.tokenizer is 'checkpoint', but init.hf_dir is not set. Give --config.init.hf_dir=DIR, or another "
                "tokenizer."
            )
        name = tokenizer_name(source)
        config.data.text.tokenizer = config.init.hf_dir if name == source else name
    elif (
        config.init.hf_dir
        and config.data.text.tokenizer == "bytes"
        and config.data.text_fraction
        and (Path(source) / "tokenizer.json").is_file()
    ):
        raise ConfigError(
            f"data.text.tokenizer is 'bytes', but the model of {config.init.hf_dir} reads the tokens of its tokenizer.json. "
            "Set data.text.tokenizer=checkpoint (and data.recall_fraction=0 where that leaves no token ids to recall)."
        )
    return config


def _first_dense(config: Config, theirs: ModelConfig) -> tuple[str, ...]:
    """Roles of the layers where the first `init.dense_layers` stay dense."""
    n, given = config.init.dense_layers, config.model.attention.layer_types
    roles = (DENSE,) * n + (FULL,) * (theirs.n_layers - n)
    if theirs.attention.indexer.enabled or given not in ((), roles) or n >= theirs.n_layers:
        raise ConfigError(
            f"init.dense_layers is {n}; expected fewer than the {theirs.n_layers} layers of {config.init.hf_dir}, a checkpoint "
            "without indexers, and no model.attention.layer_types beside it. Name every layer there, or leave it out."
        )
    return roles


def present_source(hf_dir: str, kept: Path | None) -> str:
    """`hf_dir`, or the directory `kept` of `keep_source` where that is gone."""
    is_gone = bool(hf_dir) and not (Path(hf_dir) / "config.json").exists()
    return str(kept) if is_gone and kept is not None and (kept / "config.json").is_file() else hf_dir


def present_inputs(config: Config, kept: Path) -> Config:
    """`config` with what `keep_source` wrote to `kept` in the place of an `init.hf_dir` that is gone, and of its tokenizer."""
    present, source = copy.deepcopy(config), present_source(config.init.hf_dir, kept)
    tokenizer = Path(config.data.text.tokenizer)
    if source != config.init.hf_dir and tokenizer.is_relative_to(config.init.hf_dir):
        present.data.text.tokenizer = str(Path(source) / tokenizer.relative_to(config.init.hf_dir))
    present.init.hf_dir = source
    return present


def keep_source(hf_dir: str, kept: Path) -> None:
    """Copy config, tokenizer and model card of a checkpoint, from which a run continues when the checkpoint is gone."""
    if (kept / "config.json").exists():
        return
    kept.mkdir(exist_ok=True)
    for name, file in tokenizer_files(Path(hf_dir)).items():
        shutil.copyfile(file, kept / name)
    if (card := Path(hf_dir) / "README.md").is_file():
        shutil.copyfile(card, kept / card.name)
    content = read_json(Path(hf_dir) / "config.json")
    if stated_dtype(content) is None:
        content["torch_dtype"] = read_model_config(hf_dir).dtype  # it was read from the weights, which may go
    write_object(kept / "config.json", content)  # last: it marks the copy as complete


def _merged(ours: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """The checkpoint's model, computed as the recipe says; warns of settings of the recipe that it overrides."""
    model = dataclasses.replace(theirs, **{name: getattr(ours, name) for name in _OF_THE_RUN})
    model.attention = dataclasses.replace(theirs.attention, implementation=ours.attention.implementation)
    model.attention = extended(model.attention, ours.attention)
    if not theirs.attention.indexer.enabled:
        model.attention.indexer = copy.deepcopy(ours.attention.indexer)
        model.attention.layer_types = ours.attention.layer_types or theirs.attention.layer_types
    balance = {name: getattr(ours.moe, name) for name in ("bias_update_rate", "balance_loss_weight")}
    model.moe = dataclasses.replace(theirs.moe, **balance)
    asked, usual, used = (flatten(to_dict(each)) for each in (ours, ModelConfig(), model))
    ignored = [
        f"{name}={value!r} (the checkpoint: {used[name]!r})"
        for name, value in asked.items()
        if value != usual[name] and value != used[name]
    ]
    if ignored:
        _LOG.warning("settings of the model without effect beside init.hf_dir: model.%s", ", model.".join(ignored))
    return model


def checkpoint_params(config: Config) -> dict[str, Any]:
    """The weights of `init.hf_dir` for the resolved `config`, each sharded over the current mesh as it is read.

    Indexers that the checkpoint lacks, and parameters by which the attention kind extends it, are initialised from `seed`;
    indexers then are scaled as `init.scale_new_indexers` says.
    """
    indexer = config.model.attention.indexer
    loaded = load_pretrained(
        config.init.hf_dir,
        dtype=config.model.param_dtype,
        indexer=indexer if indexer.enabled else None,
        layer_types=config.model.attention.layer_types if indexer.enabled else (),
        extended_by=config.model.attention,
        seed=config.seed,
        mesh=current_mesh(),
    )
    if (
        not (config.init.scale_new_indexers and indexer.enabled)
        or read_model_config(config.init.hf_dir).attention.indexer.enabled
    ):
        return loaded.params
    leaves = parameter_paths(loaded.params)
    return nested_parameters(divided_by_gain(leaves, [path for path in leaves if is_indexer_path(path)]))


def load_for_evaluation(config: Config) -> tuple[Config, Transformer, dict[str, Any]]:
    """(config, model, params) of `init.hf_dir` unchanged: a checkpoint without an indexer gets none."""
    config = resolve_checkpoint(config)
    loaded = load_pretrained(
        config.init.hf_dir,
        dtype=config.model.param_dtype,
        weight_format=config.model.weight_format,
        mesh=current_mesh(),
    )
    # Weights are stored as model.param_dtype says, and multiplied as model.dtype does.
    config.model = dataclasses.replace(loaded.config, dtype=config.model.dtype)
    return config, build_model(config.model), loaded.params


def export_checkpoint(
    directory: Path,
    config: Config,
    params: dict[str, Any],
    *,
    attention: str,
    before_replacing: Callable[[Path], None] = lambda complete: None,
) -> None:
    """Write `params` as a Hugging Face checkpoint, marked as trained under `attention`, as `save_pretrained` does.

    Its tokenizer is that of the text; where none was trained on, that of the checkpoint the run started from, if it has one.
    With several processes the first writes; its host needs room for the whole model.
    """
    model = copy.deepcopy(config.model)
    model.attention.mode = attention
    whole = gather_to_main(params)
    tokenizer: Tokenizer | str = load_tokenizer(config.data.text.tokenizer)
    if not config.data.text_fraction and has_tokenizer_files(config.init.hf_dir):
        tokenizer = config.init.hf_dir
    on_main(lambda: save_pretrained(directory, model, whole, tokenizer=tokenizer, before_replacing=before_replacing))
