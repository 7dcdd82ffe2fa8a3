"""Where parameters come from: random numbers, a Hugging Face checkpoint, or another run with what it lacks initialised."""

import copy
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsa_jax.checkpoints.from_hf import checkpoint_params
from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ConfigError
from dsa_jax.config.selections import selection
from dsa_jax.data.tokenizer import NO_TOKENIZER
from dsa_jax.model import Transformer, abstract_params, build_model, init_params
from dsa_jax.model.attention.indexer_scale import divided_by_gain
from dsa_jax.model.attention.kinds import is_optional, kinds_of
from dsa_jax.model.stacks import layer_stacks, restacked
from dsa_jax.parallel.placement import current_mesh, with_shardings
from dsa_jax.parallel.rules import check_divisible
from dsa_jax.params import nested_parameters, parameter_paths
from dsa_jax.run.checkpoints import CheckpointStore, newest_checkpoint
from dsa_jax.run.directory import RunDirectory, find_run
from dsa_jax.run.files import RunError
from dsa_jax.run.processes import on_main
from dsa_jax.train.stages import stage_of, trained_attention

_LOG = logging.getLogger(__name__)

Params = dict[str, Any]


class LoadedRun(NamedTuple):
    """A run read back; its parameters are from `step` of `stage`. The model's mode is what it was trained under.

    `text` is the digest of the text that it was trained on, None where the checkpoint does not say.
    """

    config: Config
    model: Transformer
    params: Params
    stage: str
    step: int
    text: str | None


def load_run(directory: Path, *, stage: str | None = None) -> LoadedRun:
    """The configuration, model and newest parameters of a run directory, split by the rules where there is a mesh.

    Args:
        directory: as `experiments.retrofit --workdir` wrote it.
        stage: take this stage's newest checkpoint; None: the furthest stage that has one.

    Raises:
        RunError: where the directory is no run, holds no usable checkpoint, or one with a parameter that is not finite.
        ConfigError: where the mesh does not divide a parameter.
    """
    run = find_run(directory)
    config = run.config()
    model = build_model(config.model)
    newest = newest_checkpoint(run, [stage] if stage else STAGE_ORDER)
    if newest is None:
        wanted = f"of stage {stage} " if stage else ""
        raise RunError(
            f"{directory} holds no usable checkpoint {wanted}under checkpoints/. Run experiments.retrofit there first."
        )
    name, step = newest
    abstract = abstract_params(model)
    if mesh := current_mesh():
        check_divisible(abstract, mesh.shape)
    with CheckpointStore(run.checkpoint_dir(name), keep=config.train.keep_checkpoints) as store:
        restored = store.restore(step, with_shardings({"params": abstract}), subset=True)
    if not_finite := _not_finite(restored.tree["params"]):
        raise RunError(
            f"{run.checkpoint_dir(name) / str(step)} holds {not_finite[0]}, which is NaN or infinite in part "
            f"({len(not_finite)} parameters are); expected finite ones. Take a checkpoint of an earlier step or stage."
        )
    config.model.attention.mode = trained_attention(config, name)
    find_tokenizer(config, run)
    saved = restored.meta.get("data") or {}
    digest = saved.get("sha256") or saved.get("corpus")
    return LoadedRun(config, build_model(config.model), restored.tree["params"], name, step, digest)


def find_tokenizer(config: Config, run: RunDirectory) -> None:
    """Let `config` name the tokenizer that its run has copied or exported where its own one is gone."""
    text = config.data.text
    kept = [folder for folder in (run.source_path, run.export_path) if (folder / "tokenizer.json").is_file()]
    is_missing = text.tokenizer not in ("bytes", NO_TOKENIZER) and not Path(text.tokenizer).exists()
    if is_missing and kept:
        _LOG.info("%s is gone: the tokenizer is the one that was copied to %s", text.tokenizer, kept[0])
        text.tokenizer = str(kept[0])


def _not_finite(params: Params) -> list[str]:
    """Paths of the parameters that are NaN or infinite somewhere."""
    leaves = parameter_paths(params)
    is_finite = jax.device_get(jax.jit(lambda leaves: [jnp.isfinite(leaf).all() for leaf in leaves])(list(leaves.values())))
    return [path for path, each in zip(leaves, is_finite, strict=True) if not each]


def resolve_run(config: Config, workdir: Path) -> Config:
    """`config` with the attention under which `init.checkpoint` was trained as its model's mode.

    A run in `workdir` that has saved something keeps the mode it recorded, whether or not its source is still there. Without
    `init.checkpoint` this is the same config.

    Raises:
        RunError: where the source is no run.
    """
    if not config.init.checkpoint:
        return config

    resolved, run = copy.deepcopy(config), RunDirectory(workdir, resumed=True)
    if on_main(lambda: run.has_begun and run.config().init == config.init):
        resolved.model.attention.mode = run.config().model.attention.mode
        return resolved
    source = find_run(config.init.checkpoint)
    newest = newest_checkpoint(source, [config.init.stage] if config.init.stage else STAGE_ORDER)
    resolved.model.attention.mode = trained_attention(source.config(), newest[0] if newest else "")
    return resolved


def initial_params(config: Config, model: Transformer, *, abstract: bool = False) -> Params:
    """Parameters a run starts from; `abstract` gives only their shapes, for a run that continues from its own checkpoint.

    With `init.hf_dir` they are that checkpoint's, what it lacks initialised. With `init.checkpoint` every parameter comes
    from that run; only those of indexers and of native sparse attention may be missing there, and they are initialised from
    `seed` and listed.

    Raises:
        ConfigError: naming parameters that are missing, left over or of another shape, with both shapes; or where the run was
            trained under another attention than the config says.
    """
    if abstract:
        return abstract_params(model)
    if config.init.hf_dir:
        return checkpoint_params(config)
    fresh = init_params(model, jax.random.key(config.seed))
    if not config.init.checkpoint:
        return fresh
    source = Path(config.init.checkpoint)
    loaded = load_run(source, stage=config.init.stage or None)
    if loaded.config.model.attention.mode != config.model.attention.mode:
        raise ConfigError(
            f"model.attention.mode is {config.model.attention.mode!r}, but what can be read of init.checkpoint {source} is "
            f"from stage {loaded.stage}, trained under {loaded.config.model.attention.mode!r}. Give that stage as init.stage."
        )
    target, have = parameter_paths(fresh), parameter_paths(loaded.params)
    theirs, ours = layer_stacks(loaded.config.model), layer_stacks(config.model)
    same_layers = config.model.n_layers == loaded.config.model.n_layers
    if same_layers and [stack.name for stack in theirs] != [stack.name for stack in ours]:
        have = restacked(have, theirs, ours)
    problems = [
        f"{path}: here {tuple(target[path].shape)}, there {tuple(have[path].shape) if path in have else 'absent'}"
        for path in target
        if (path not in have and not is_optional(path)) or (path in have and have[path].shape != target[path].shape)
    ]
    problems += [f"{path}: here absent, there {tuple(have[path].shape)}" for path in have if path not in target]
    if problems:
        raise ConfigError(
            f"init.checkpoint {source} does not fit the model: {'; '.join(problems[:8])}. Set model.* as in its config.json."
        )
    new = [path for path in target if path not in have]
    _LOG.info("parameters of stage %s taken from %s; newly initialised: %s", loaded.stage, source, ", ".join(new) or "none")
    taken = {path: have[path].astype(target[path].dtype) if path in have else target[path] for path in target}
    return nested_parameters(divided_by_gain(taken, new) if config.init.scale_new_indexers else taken)


def at_start_of_stage(params: Params, config: Config, name: str) -> Params:
    """The parameters with which the stage `name` takes its first step.

    Where a model that was trained under another attention turns to one that its attention kind alone answers, the kind says
    where the parameters of that one start (`AttentionKind.turned`).
    """
    has_learned = bool(config.init.checkpoint or config.init.hf_dir or (name == "sparse" and config.train.pretrain.n_steps))
    before, attention = trained_attention(config, "warmup" if name == "sparse" else ""), stage_of(config, name).attention
    if not selection(attention).kind or before == attention or not has_learned:
        return params
    leaves = parameter_paths(params)
    for kind in kinds_of(config.model):
        if kind.name == selection(attention).kind:
            leaves = kind.turned(leaves)
    return nested_parameters(leaves)
