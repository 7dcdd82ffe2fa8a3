"""The retrofit end to end: initialise, pretrain if the recipe has it, warm up the indexer, train sparse, evaluate, report."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dsa_jax.checkpoints.from_hf import export_checkpoint, keep_source, present_inputs, resolve_checkpoint
from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.weights import read_json
from dsa_jax.checkpoints.text_record import write_text_record
from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ConfigError, StageConfig, to_dict
from dsa_jax.config.checks import user_path
from dsa_jax.config.selections import DENSE
from dsa_jax.costs.comparison import dense_and_sparse
from dsa_jax.data import EvalData, TrainData, make_data
from dsa_jax.evals.held_out import HeldOut
from dsa_jax.evals.parity import EvalStep, evaluate_parity, rehearsed_rows
from dsa_jax.model import build_model
from dsa_jax.model.attention.kinds import kinds_of
from dsa_jax.opening import opening_of
from dsa_jax.parallel.check import check_layout
from dsa_jax.parallel.placement import on_mesh, place
from dsa_jax.report.card import base_of, model_card
from dsa_jax.report.report import format_row, format_table, format_verdict, to_plain, write_report
from dsa_jax.run.checkpoints import latest_position
from dsa_jax.run.continuation import accepted_fields, set_report_aside, stage_lengths, tokenizer_fingerprint
from dsa_jax.run.directory import RunDirectory, check_run, open_run
from dsa_jax.run.environment import source_fingerprint
from dsa_jax.run.export import admit_export, require_own_export, write_card
from dsa_jax.run.files import RunError, claimed
from dsa_jax.run.metrics import MetricsLog
from dsa_jax.run.processes import any_process, is_main, on_main
from dsa_jax.run.signals import StopRequest
from dsa_jax.run.trackers import open_trackers, require_trackers
from dsa_jax.train.init import at_start_of_stage, initial_params, load_run, resolve_run
from dsa_jax.train.loop import Training, rehearsed_steps, run_stage
from dsa_jax.train.stages import stage_of, trained_attention
from dsa_jax.watch import Watch
from pallas_kernels import implementations_chosen

_LOG = logging.getLogger(__name__)
_COARSE_RATE = 1e-4  # at this learning rate Adam moves a weight of 0.05 by 1/512


def retrofit(config: Config, workdir: Path) -> dict[str, Any] | None:
    """Run every stage with a positive number of steps, then the parity table; continue where an earlier call stopped.

    A run that starts from a Hugging Face directory writes one, `workdir`/hf, unless the model has native sparse attention. The
    report is written last and marks the run as complete.

    Returns:
        The report (also in report.json), or None if a signal stopped the run, with all it had done saved.

    Raises:
        ConfigError, RunError: with one line that says what was wrong and what to do.
        MissingExtraError: where the package of a tracker is not installed.
    """
    check_places(config, workdir)
    run, dtype = RunDirectory(workdir, resumed=True), config.model.dtype
    config = resolve_run(resolve_checkpoint(config, run.source_path), workdir)
    config.validate()
    require_trackers(config)
    if _stages(config):
        config.model.check_trainable()
    check_layout(config)
    config = config.laid_out()
    if is_main():
        print(opening_of(config, dtype=dtype), flush=True)
    for remark in _remarks(config):
        _LOG.warning("%s", remark)
    with ExitStack() as claim, on_mesh(config.parallel):
        inputs = _Inputs(config, run)
        if report := _finished(inputs):
            _LOG.info("%s is complete; without its report.json it would be evaluated again", workdir)
            return _shown(report, workdir)
        on_main(lambda: claim.enter_context(claimed(workdir)))
        return _retrofit(inputs)


def check_places(config: Config, workdir: Path) -> None:
    """Check that the run writes nowhere into the weights that it starts from.

    Raises:
        ConfigError: where `workdir` is, contains or lies in `init.hf_dir`, or is `init.checkpoint`.
    """
    target = workdir.resolve()
    for name in ("hf_dir", "checkpoint"):
        given = getattr(config.init, name)
        source = user_path(f"init.{name}", given).resolve()
        overlap = source in target.parents or target in source.parents if name == "hf_dir" else False
        if given and (source == target or overlap):
            raise ConfigError(
                f"init.{name} is {given} and --workdir is {workdir}; expected directories of which neither lies in the other, "
                "since a run writes to its own. Choose another --workdir."
            )


class _Inputs:
    """A resolved config with the run that it is of, and the data that it names, read once."""

    def __init__(self, config: Config, run: RunDirectory) -> None:
        self.config, self.run = config, run

    @functools.cached_property
    def present(self) -> Config:
        """The config for reading text and tokenizer, wherever they are now."""
        return present_inputs(self.config, self.run.source_path)

    @functools.cached_property
    def data(self) -> tuple[TrainData, EvalData]:
        """The training and the evaluation data."""
        return make_data(self.present.data, self.config.seed, self.config.model.vocab_size)

    def accepted(self) -> frozenset[str]:
        """The fields in which the config may differ from the recorded one; every process calls this."""
        return accepted_fields(self.run, self.config, self.text_digest)

    def text_digest(self) -> str | None:
        """The digest of the text; None where no text is read."""
        text = self.data[0].describe()["text"]
        return text and text["sha256"]


def _finished(inputs: _Inputs) -> dict[str, Any] | None:
    """The report of a completed run whose last checkpoint and export are there, too; else None. Nothing is written."""
    config, run = inputs.config, inputs.run
    accepted = inputs.accepted()
    report = on_main(lambda: _showable(run.finished_report(config, accepted), run.report_path))
    exports = config.init.hf_dir and not _not_exported(config)
    if report is None or (exports and not on_main((run.export_path / "config.json").exists)):
        return None
    return report if latest_position(run, config) == _last_position(config) else None


def _showable(report: dict[str, Any] | None, file: Path) -> dict[str, Any] | None:
    """The report, or None where `file` held parts of other kinds than a run writes, of which no table or verdict is made."""
    try:
        if report is not None:
            format_table(report["rows"])
            format_verdict(report)
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        _LOG.warning("%s is not what a run writes (%s: %s). It is made again.", file, type(error).__name__, error)
        return None
    return report


def _last_position(config: Config) -> tuple[str, int] | None:
    """The last stage and its last step."""
    return next(((name, stage.n_steps) for name, stage in reversed(_stages(config).items())), None)


def _stages(config: Config) -> dict[str, StageConfig]:
    """The stages that the recipe has, in order."""
    return {name: stage for name in STAGE_ORDER if (stage := getattr(config.train, name)).n_steps}


def _shown(report: dict[str, Any], workdir: Path) -> dict[str, Any]:
    if is_main():
        print(format_table(report["rows"]))
        print(format_verdict(report))
        print(f"report: {workdir / 'report.html'}")
    return report


def _retrofit(inputs: _Inputs) -> dict[str, Any] | None:
    config, run = inputs.config, inputs.run
    accepted, position = inputs.accepted(), latest_position(run, config)
    on_main(lambda: _check(inputs, accepted, is_trained=position == _last_position(config)))
    train_data, eval_data = inputs.data
    check_lengths(config, train_data, eval_data)
    model = build_model(config.model)
    last_stage, last_step = position or ("", None)
    names = [name for name in _stages(config) if STAGE_ORDER.index(name) >= (STAGE_ORDER.index(last_stage) if position else 0)]
    _LOG.info("tracing every step before the first one, to find what cannot be computed")
    steps = rehearsed_steps(model, [stage_of(config, name) for name in names], config)
    eval_steps = rehearsed_rows(model, eval_data, config)
    on_main(lambda: _open(inputs, accepted))
    params = initial_params(config, model, abstract=position is not None)
    if position is None:
        params = place(params)
        on_main(lambda: _record_inputs(inputs))
    summaries: dict[str, dict[str, Any]] = {}
    trackers = open_trackers(run.path, config) if is_main() else []
    log = MetricsLog(run.metrics_path if is_main() else None, trackers=trackers)
    with StopRequest() as stop, log as metrics:
        watch = Watch(run, config, HeldOut(model, eval_data, config, eval_steps), metrics)
        gates = {"warmup": watch.gate} if config.train.gate != "off" and "sparse" in names else {}
        training = Training(run, config, model, train_data, stop, metrics, steps, watch.look, gates)
        for name in names:
            resume_step = last_step if name == last_stage else None
            if resume_step is None:
                params = at_start_of_stage(params, config, name)
            stage = stage_of(config, name)
            result = run_stage(training, stage, params, resume_step=resume_step, summaries=summaries)
            params, summaries = result.params, result.summaries
            _record_implementations(run)
            if not result.is_complete:
                taken = summaries[name]["steps"]
                where = f"step {taken} of {result.n_steps} is saved" if taken else "before its first step"
                _LOG.warning("stopped by %s in stage %s, %s; the same command continues", _sender(stop), name, where)
                return None
        if any_process(stop.requested):
            _LOG.warning("stopped by %s after the last step, every step is saved; the same command continues", _sender(stop))
            return None
        if config.init.hf_dir:
            _export(inputs, params)
        card = functools.partial(_write_card, inputs)
        return _evaluate_and_report(training, params, summaries, eval_data, eval_steps, before_report=card)


def _check(inputs: _Inputs, accepted: frozenset[str], *, is_trained: bool) -> None:
    """Check that the run may begin or continue in its directory, before anything is read or written."""
    config, run = inputs.config, inputs.run
    check_run(run, config, accepted=accepted)
    if config.init.hf_dir and not _not_exported(config) and not is_trained:
        require_own_export(run)


def _open(inputs: _Inputs, accepted: frozenset[str]) -> None:
    """Open the run directory, whose earlier report is set aside where more steps will make another."""
    if accepted and stage_lengths(inputs.run.config()) != stage_lengths(inputs.config):
        set_report_aside(inputs.run)
    open_run(inputs.run.path, inputs.config, accepted=accepted)


def _record_inputs(inputs: _Inputs) -> None:
    """Record what a run starts from by content, so that it can move or, where it is a Hugging Face directory, go."""
    config, run = inputs.config, inputs.run
    text = inputs.text_digest()
    run.update_environment(
        source=source_fingerprint(config.init), tokenizer=tokenizer_fingerprint(config.data.text.tokenizer), text=text
    )
    if config.init.hf_dir:
        keep_source(config.init.hf_dir, run.source_path)


def _sender(stop: StopRequest) -> str:
    return stop.signal_name or "a signal to another process"


def _export(inputs: _Inputs, params: dict[str, Any]) -> None:
    """Write `hf`, marked as trained under the attention of the last stage, or warn that it cannot be."""
    config, run = inputs.config, inputs.run
    if reason := _not_exported(config):
        _LOG.warning("no Hugging Face checkpoint: no published format holds %s", reason)
        return
    attention = trained_attention(config, next(reversed(_stages(config)), ""))
    text = inputs.data[1].describe()["text"]

    def admit(complete: Path) -> None:
        if text:
            write_text_record(complete, text, config.data.text)
        admit_export(run, complete)

    export_checkpoint(run.export_path, inputs.present, params, attention=attention, before_replacing=admit)
    if is_main():
        print(f"Hugging Face checkpoint: {run.export_path}")


def _write_card(inputs: _Inputs, report: dict[str, Any]) -> None:
    """Write the model card of the export, where there is one, from the report."""
    config, run = inputs.config, inputs.run
    if config.init.hf_dir and not _not_exported(config):
        base = base_of(config.init.hf_dir, Path(inputs.present.init.hf_dir))
        model_type = read_json(run.export_path / "config.json")["model_type"]
        write_card(run, model_card(to_plain(report), base, model_type))


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
        f"train.{name}.optimizer.warmup_steps is {stage.optimizer.warmup_steps}, of {stage.n_steps} steps in all: the learning "
        f"rate never reaches {stage.optimizer.learning_rate:g}"
        for name, stage in stages.items()
        if stage.optimizer.warmup_steps > stage.n_steps
    ]
    rates = [stage.optimizer.learning_rate for name, stage in stages.items() if stage_of(config, name).has_lm_loss]
    if config.model.param_dtype == "bfloat16" and min(rates, default=1.0) < _COARSE_RATE:
        remarks.append(
            f"model.param_dtype is bfloat16, in which an update below 1/512 of a weight is lost, as most are at a learning "
            f"rate of {min(rates):g}; float32 keeps them, with model.dtype=bfloat16 for the speed"
        )
    if (trained := stages.get("sparse")) and (costs := dense_and_sparse(config.model, trained.longest)):
        dense, sparse = costs["dense_flops"][0], costs["sparse_flops"][0]
        if sparse > dense:
            start = costs["pays_from"]
            where = f"from {start} tokens on it costs less" if start else f"so it does up to {costs['lengths'][-1]} tokens"
            remarks.append(
                f"sparse attention costs more than dense at train.sparse.seq_len {trained.longest}: {sparse / 1e9:.3g} GFLOP a "
                f"token instead of {dense / 1e9:.3g}; {where}. A smaller model.attention.indexer (n_heads, head_dim) costs less"
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
    if not config.train.sparse.n_steps or trained_attention(config, "warmup") != DENSE:
        return None
    try:
        if config.train.pretrain.n_steps:
            loaded = load_run(run.path, stage="pretrain")
            if loaded.step != config.train.pretrain.n_steps:
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
    training: Training,
    params: dict[str, Any],
    summaries: dict[str, dict[str, Any]],
    data: EvalData,
    steps: Mapping[str, EvalStep],
    *,
    before_report: Callable[[dict[str, Any]], None],
) -> dict[str, Any] | None:
    """Evaluate the parity table, write report.json and report.html (in the first process), and return the report.

    The first process calls `before_report` with the report before it is written, which marks the run as complete.
    On a stop request, of any process, the row in progress is finished and None returned.
    """
    run, config, model, stop = training.run, training.config, training.model, training.stop
    started = time.perf_counter()

    def announce(row: dict[str, Any]) -> None:
        _LOG.info("evaluated %s", format_row(row))
        if any_process(stop.requested):
            raise _EvaluationStopped

    try:
        before = _dense_params_before(run, config)
        table = evaluate_parity(model, params, data, config, params_before=before, on_row=announce, steps=steps)
    except _EvaluationStopped:
        _LOG.warning("stopped by %s while evaluating, every step is saved; the same command continues", _sender(stop))
        return None
    _record_implementations(run)
    report = {
        "name": config.name,
        "rows": table.rows,
        "remarks": table.remarks,
        "setup": {"checkpoint": run.words_for(next(reversed(_stages(config)), "")), **table.setup},
        "samples": [dataclasses.asdict(sample) for sample in table.samples],
        "stages": summaries | {"evaluate": {"seconds": time.perf_counter() - started}},
        "coverage_by_layer": table.coverage_by_layer,
        "loss_by_position": {"positions": table.position_ends, **table.loss_by_position},
        "loss_difference_by_position": table.loss_difference_by_position,
        "costs": table.costs,
        "corpus": data.describe(),
        "config": to_dict(config),
        "environment": run.environment(),
    }
    on_main(lambda: before_report(report))
    on_main(lambda: write_report(run.path, report))
    return _shown(report, run.path)


def _record_implementations(run: RunDirectory) -> None:
    on_main(lambda: run.update_environment(implementations=implementations_chosen()))
