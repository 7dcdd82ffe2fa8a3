"""The retrofit end to end: initialise, pretrain if the recipe has it, warm up the indexer, train sparse, evaluate, report."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dsa_jax.checkpoints.from_hf import export_checkpoint, resolve_checkpoint
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ConfigError, StageConfig, to_dict
from dsa_jax.config.selections import DENSE
from dsa_jax.data import EvalData, TrainData, make_eval_data, make_train_data
from dsa_jax.evals.parity import evaluate_parity
from dsa_jax.model import build_model
from dsa_jax.model.attention.kinds import kinds_of
from dsa_jax.parallel.check import check_layout
from dsa_jax.parallel.placement import on_mesh, place
from dsa_jax.params import count_parameters, is_indexer_path, split_parameters
from dsa_jax.report.report import format_table, write_report
from dsa_jax.run.checkpoints import latest_position
from dsa_jax.run.directory import RunDirectory, open_run
from dsa_jax.run.environment import source_fingerprint
from dsa_jax.run.files import RunError, claimed
from dsa_jax.run.metrics import MetricsLog
from dsa_jax.run.processes import any_process, is_main, on_main
from dsa_jax.run.signals import StopRequest
from dsa_jax.train.init import at_start_of_stage, initial_params, load_run, resolve_run
from dsa_jax.train.loop import Training, run_stage
from dsa_jax.train.stages import stage_of, trained_attention
from pallas_kernels import implementations_chosen

_LOG = logging.getLogger(__name__)
_COARSE_RATE = 1e-4  # at this learning rate Adam moves a weight of 0.05 by 1/512


def retrofit(config: Config, workdir: Path, *, tensorboard: bool = False) -> dict[str, Any] | None:
    """Run every stage with a positive number of steps, then the parity table; continue where an earlier call stopped.

    A run that starts from a Hugging Face directory writes one, `workdir`/hf, unless the model has native sparse attention. The
    report is written last and marks the run as complete.

    Returns:
        The report (also in report.json), or None if a signal stopped the run, with all it had done saved.

    Raises:
        ConfigError, RunError: with one line that says what was wrong and what to do.
    """
    config = resolve_run(resolve_checkpoint(config), workdir)
    config.validate()
    if _stages(config):
        config.model.check_trainable()
    check_layout(config)
    for remark in _remarks(config):
        _LOG.warning("%s", remark)
    with ExitStack() as claim, on_mesh(config.parallel):
        on_main(lambda: claim.enter_context(claimed(workdir)))
        if report := _finished(config, workdir):
            _LOG.info("%s is complete; without its report.json it would be evaluated again", workdir)
            return _shown(report, workdir)
        return _retrofit(config, workdir, tensorboard)


def _finished(config: Config, workdir: Path) -> dict[str, Any] | None:
    """The report of a completed run whose last checkpoint and export are there, too; else None."""
    run = RunDirectory(workdir, resumed=True)
    report = on_main(lambda: run.finished_report(config))
    exports = config.init.hf_dir and not _not_exported(config)
    if report is None or (exports and not on_main((workdir / "hf" / "config.json").exists)):
        return None
    last = next(((name, stage.steps) for name, stage in reversed(_stages(config).items())), None)
    return report if latest_position(run, config) == last else None


def _stages(config: Config) -> dict[str, StageConfig]:
    """The stages that the recipe has, in order."""
    return {name: stage for name in STAGE_ORDER if (stage := getattr(config.train, name)).steps}


def _shown(report: dict[str, Any], workdir: Path) -> dict[str, Any]:
    if is_main():
        print(format_table(report["rows"]))
        print(f"report: {workdir / 'report.html'}")
    return report


def _retrofit(config: Config, workdir: Path, tensorboard: bool) -> dict[str, Any] | None:
    train_data = make_train_data(config.data, config.seed, config.model.vocab_size)
    eval_data = make_eval_data(config.data, config.seed, config.model.vocab_size)
    check_lengths(config, train_data, eval_data)
    run = RunDirectory(workdir, resumed=on_main(lambda: open_run(workdir, config).resumed))
    model = build_model(config.model)
    position = latest_position(run, config)
    params = initial_params(config, model, abstract=position is not None)
    if position is None:
        params = place(params)
        if config.init.hf_dir or config.init.checkpoint:
            on_main(lambda: run.update_environment(source=source_fingerprint(config.init)))
    n_indexer = count_parameters(split_parameters(params, is_indexer_path)[0])
    _LOG.info("%s: %d parameters, %d of them in indexers", config.name, count_parameters(params), n_indexer)
    summaries: dict[str, dict[str, Any]] = {}
    log = MetricsLog(run.metrics_path if is_main() else None, tensorboard=tensorboard)
    with StopRequest() as stop, log as metrics:
        training = Training(run, config, model, train_data, stop, metrics)
        last_stage, last_step = position or ("", None)
        for name, settings in _stages(config).items():
            if last_stage and STAGE_ORDER.index(name) < STAGE_ORDER.index(last_stage):
                continue
            resume_step = last_step if name == last_stage else None
            if resume_step is None:
                params = at_start_of_stage(params, config, name)
            stage = stage_of(config, name)
            params, summaries, is_complete = run_stage(training, stage, params, resume_step=resume_step, summaries=summaries)
            _record_implementations(run)
            if not is_complete:
                taken = summaries[name]["steps"]
                where = f"step {taken} of {settings.steps} is saved" if taken else "before its first step"
                _LOG.warning("stopped by %s in stage %s, %s; the same command continues", _sender(stop), name, where)
                return None
        if any_process(stop.requested):
            _LOG.warning("stopped by %s after the last step, every step is saved; the same command continues", _sender(stop))
            return None
        if config.init.hf_dir:
            _export(run, config, params)
        return _evaluate_and_report(training, params, summaries, eval_data)


def _sender(stop: StopRequest) -> str:
    return stop.signal_name or "a signal to another process"


def _export(run: RunDirectory, config: Config, params: dict[str, Any]) -> None:
    """Write `hf`, marked as trained under the attention of the last stage, or warn that it cannot be."""
    if reason := _not_exported(config):
        _LOG.warning("no Hugging Face checkpoint: no published format holds %s", reason)
    else:
        last = next(reversed(_stages(config)), "")
        export_checkpoint(run.path / "hf", config, params, attention=trained_attention(config, last))
        if is_main():
            print(f"Hugging Face checkpoint: {run.path / 'hf'}")


def _not_exported(config: Config) -> str:
    """The part of the model that a Hugging Face checkpoint cannot hold; empty where it can hold all."""
    if titles := [mode.title for kind in kinds_of(config.model) for mode in kind.modes]:
        return ", ".join(titles)
    fields = config.model.attention.indexer.unpublished()
    return f"an indexer with {', '.join(fields)}" if fields else ""


def _remarks(config: Config) -> list[str]:
    """Warnings about settings that run but are seldom intended."""
    stages = _stages(config)
    remarks = [
        f"train.{name}.optimizer.warmup_steps is {stage.optimizer.warmup_steps}, of {stage.steps} steps in all: the learning "
        f"rate never reaches {stage.optimizer.learning_rate:g}"
        for name, stage in stages.items()
        if stage.optimizer.warmup_steps > stage.steps
    ]
    rates = [stage.optimizer.learning_rate for name, stage in stages.items() if name != "warmup"]
    if config.model.param_dtype == "bfloat16" and min(rates, default=1.0) < _COARSE_RATE:
        remarks.append(
            f"model.param_dtype is bfloat16, in which an update below 1/512 of a weight is lost, as most are at a learning "
            f"rate of {min(rates):g}; float32 keeps them, with model.dtype=bfloat16 for the speed"
        )
    return remarks


def check_lengths(config: Config, train_data: TrainData, eval_data: EvalData) -> None:
    """Check, before training, that the data can make batches of every length of the recipe.

    Raises:
        ConfigError: naming the length and what stands in its way.
    """
    for stage in _stages(config).values():
        for seq_len in stage.lengths:
            train_data.check(batch_size=stage.batch_size, seq_len=seq_len)
    eval_data.check(config.eval)


def _dense_params_before(run: RunDirectory, config: Config) -> dict[str, Any] | None:
    """Parameters of the dense model that the retrofit started from; None where they are gone."""
    if not config.train.sparse.steps or trained_attention(config, "warmup") != DENSE:
        return None
    try:
        if config.train.pretrain.steps:
            loaded = load_run(run.path, stage="pretrain")
            if loaded.step != config.train.pretrain.steps:
                raise RunError(f"of stage pretrain only step {loaded.step} is left")
            return place(loaded.params)
        if not (config.init.hf_dir or config.init.checkpoint):
            return None
        if on_main(lambda: run.environment().get("source") not in (None, source_fingerprint(config.init))):
            raise RunError(f"{config.init.hf_dir or config.init.checkpoint} is not what it was when this run started from it")
        return place(initial_params(config, build_model(config.model)))
    except (ConfigError, RunError, CheckpointError) as error:
        _LOG.warning("the row of the dense model before sparse training is left out: %s", error)
        return None


class _EvaluationStopped(Exception):
    """A signal came during evaluation."""


def _evaluate_and_report(
    training: Training, params: dict[str, Any], summaries: dict[str, dict[str, Any]], data: EvalData
) -> dict[str, Any] | None:
    """Evaluate the parity table, write report.json and report.html (in the first process), and return the report.

    On a stop request, of any process, the row in progress is finished and None returned.
    """
    run, config, model, _, stop, _ = training
    started = time.perf_counter()

    def announce(row: dict[str, Any]) -> None:
        _LOG.info("evaluated %s", row["name"])
        if any_process(stop.requested):
            raise _EvaluationStopped

    try:
        table = evaluate_parity(model, params, data, config, params_before=_dense_params_before(run, config), on_row=announce)
    except _EvaluationStopped:
        _LOG.warning("stopped by %s while evaluating, every step is saved; the same command continues", _sender(stop))
        return None
    _record_implementations(run)
    report = {
        "name": config.name,
        "rows": table.rows,
        "remarks": table.remarks,
        "stages": summaries | {"evaluate": {"seconds": time.perf_counter() - started}},
        "coverage_by_layer": table.coverage_by_layer,
        "loss_by_position": {"positions": table.position_ends, **table.loss_by_position},
        "corpus": data.describe(),
        "config": to_dict(config),
        "environment": run.environment(),
    }
    on_main(lambda: write_report(run.path, report))
    return _shown(report, run.path)


def _record_implementations(run: RunDirectory) -> None:
    on_main(lambda: run.update_environment(implementations=implementations_chosen()))
