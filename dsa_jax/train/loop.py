"""Running one stage: batches in, updates, logging, checkpoints, signals and the policy on losses that are not finite."""

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ModelConfig, StageConfig
from dsa_jax.cost import training_flops_per_token
from dsa_jax.data import TrainData
from dsa_jax.devices import peaks_of
from dsa_jax.model import Transformer
from dsa_jax.parallel.placement import place, place_batch, with_shardings
from dsa_jax.parallel.processes import is_main, with_votes
from dsa_jax.train.checkpoint import CheckpointStore, newest_checkpoint
from dsa_jax.train.metrics import MetricsLog
from dsa_jax.train.progress import Discard, Progress
from dsa_jax.train.rundir import RunDirectory, RunError
from dsa_jax.train.signals import StopRequest
from dsa_jax.train.stages import Stage
from dsa_jax.train.step import TrainState, init_state, make_train_step

_LOG = logging.getLogger(__name__)
_SHOWN = ("loss", "kl")
_COUNTERS = ("is_finite", "skipped_in_a_row", "stop")


class NotFiniteError(RunError):
    """A loss, gradient or update became NaN or infinite and the policy is to stop."""


class StageResult(NamedTuple):
    """What a stage leaves: parameters, the report's words on this and earlier stages, and whether all steps were taken."""

    params: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    is_complete: bool


def restore_state(
    store: CheckpointStore, step: int, params: Any, stage: Stage, config: StageConfig
) -> tuple[TrainState, dict[str, Any]]:
    """The state saved at `step`, bit for bit, and the notes saved with it. `params` gives the expected structure and shapes."""
    abstract = with_shardings(jax.eval_shape(lambda p: init_state(p, stage, config), params))
    restored = store.restore(step, abstract)
    return restored.tree, restored.meta


def latest_position(run: RunDirectory, config: Config) -> tuple[str, int] | None:
    """The furthest stage of the recipe with a valid checkpoint, and that checkpoint's step."""
    return newest_checkpoint(run, [name for name in STAGE_ORDER if getattr(config.train, name).steps])


@dataclass
class _Judge:
    """Reads the metrics of finished steps: decides on values that are not finite, and logs."""

    run: RunDirectory
    stage: Stage
    config: Config
    metrics: MetricsLog
    saved_step: int | None
    final: dict[str, float]
    stops: bool = False  # a process has voted to stop

    def take(self, step: int, values: dict[str, jax.Array]) -> dict[str, float]:
        """Judge and log the 1-based `step`; returns what the progress line shows."""
        read = jax.device_get(values)
        self.stops |= bool(read.get("stop", False))
        if not read["is_finite"]:
            self._not_finite(step, int(read["skipped_in_a_row"]))
        record = {name: float(value) for name, value in sorted(read.items()) if not value.ndim and name not in _COUNTERS}
        record |= {f"kl_layer_{i}": float(value) for i, value in enumerate(read.get("kl_layers", ()))}
        settings: StageConfig = getattr(self.config.train, self.stage.name)
        if step % settings.log_every == 0 or step == settings.steps:
            self.metrics.log(self.stage.name, step, record)
            self.final = record
        return {name: record[name] for name in _SHOWN if name in record}

    def _not_finite(self, step: int, in_a_row: int) -> None:
        where, last = f"stage {self.stage.name}, step {step}", self._last_checkpoint()
        advice = f"Lower train.{self.stage.name}.optimizer.learning_rate"
        if self.config.train.nan_policy == "stop":
            raise NotFiniteError(
                f"loss, gradient or update is not finite in {where}; {last}. {advice} (in another --workdir where this one has "
                "a checkpoint), or set train.nan_policy=skip to drop such updates."
            )
        if in_a_row >= self.config.train.max_skipped_steps:
            raise NotFiniteError(f"{in_a_row} updates in a row were not finite up to {where}; {last}. {advice}.")
        _LOG.warning("%s: the update is not finite and was dropped (%d in a row)", where, in_a_row)

    def _last_checkpoint(self) -> str:
        position = latest_position(self.run, self.config) if self.saved_step is None else (self.stage.name, self.saved_step)
        if position is None:
            return "there is no checkpoint yet"
        stage, step = position
        return f"the last checkpoint is step {step} of stage {stage} ({self.run.checkpoint_dir(stage)})"


def run_stage(
    run: RunDirectory,
    config: Config,
    stage: Stage,
    model: Transformer,
    params: dict[str, Any],
    data: TrainData,
    stop: StopRequest,
    metrics: MetricsLog,
    *,
    resume_step: int | None,
    first_batch: int,
    summaries: dict[str, dict[str, Any]],
) -> StageResult:
    """Take the steps of `stage` from its start, or from its checkpoint `resume_step`, to its end or a stop request.

    Batches are a function of (seed, step), or follow the position in the text that is saved with the state, and the state is
    restored bit for bit, so an interrupted and resumed stage equals an undisturbed one. On a stop request the step in progress
    is finished and saved. With several processes a request to any one stops all of them, one step later.

    Args:
        run: the run directory.
        config: the resolved configuration.
        stage: which stage.
        model: the transformer.
        params: parameters at the start of the stage, which consumes them: a second copy would not fit beside a large model.
            With `resume_step` only their structure counts.
        data: training batches.
        stop: set by a signal.
        metrics: the run's log; entries after the resumed step are dropped.
        resume_step: a valid checkpoint of this stage, or None.
        first_batch: number of the batch of step 0, so that a stage reads on where the one before stopped.
        summaries: of the earlier stages: steps, seconds, compile_seconds, tokens, those timed without compilation, and final
            metrics by stage name.

    Raises:
        NotFiniteError: by `train.nan_policy`.
        RunError: where there is no batch for a step; the steps before it are saved (by a single process).
        CheckpointError: where saving or restoring fails.
    """
    settings: StageConfig = getattr(config.train, stage.name)
    with CheckpointStore(run.checkpoint_dir(stage.name), keep=config.train.keep_checkpoints) as store:
        step, n_logged = 0, None
        before: dict[str, Any] = {"seconds": 0.0, "compile_seconds": 0.0, "tokens": 0, "timed_tokens": 0, "final": {}}
        if resume_step is None:
            state = place(init_state(params, stage, settings))
        else:
            state, meta = restore_state(store, resume_step, params, stage, settings)
            step, summaries = resume_step, meta["summaries"]
            before = summaries[stage.name]
            data.restore(meta.get("data"))
            n_logged = meta.get("n_logged")
            _LOG.info("stage %s continues at step %d of %d", stage.name, step, settings.steps)
        metrics.truncate_after(STAGE_ORDER, stage.name, step)
        if is_main() and n_logged is not None and metrics.n_steps != n_logged:
            _LOG.warning(
                "%s holds %d steps up to here, and %d were logged: the report's curves will lack the others",
                *(run.metrics_path, metrics.n_steps, n_logged),
            )
        train_step = make_train_step(model, stage, config)
        voted_step = with_votes(train_step) if jax.process_count() > 1 else None
        judge = _Judge(run, stage, config, metrics, resume_step, before["final"])
        stream = None if is_main() else Discard()
        peaks = peaks_of(jax.devices()[0].device_kind)
        peak_flops = peaks and peaks.flops * jax.device_count()
        tokens_left = lambda done: settings.batch_size * sum(map(settings.seq_len_at, range(done, settings.steps)))
        with Progress(
            stage.name, settings.steps, start_step=step, peak_flops=peak_flops, tokens_left=tokens_left, stream=stream
        ) as progress:

            def summary() -> dict[str, Any]:
                timing = progress.timing()
                return {
                    "steps": step,
                    "seconds": before["seconds"] + timing.seconds,
                    "compile_seconds": before["compile_seconds"] + timing.compile_seconds,
                    "tokens": before["tokens"] + timing.tokens,
                    "timed_tokens": before.get("timed_tokens", 0) + timing.timed_tokens,
                    "final": judge.final,
                }

            def finish(pending: tuple[int, dict[str, jax.Array], int, bool] | None) -> None:
                if pending is not None:
                    number, values, seq_len, compiled = pending
                    tokens, per_token = settings.batch_size * seq_len, _flops_per_token(config.model, stage, seq_len)
                    flops = None if per_token is None else tokens * per_token
                    progress.update(number, tokens=tokens, values=judge.take(number, values), compiled=compiled, flops=flops)
                    if number % settings.log_every == 0:
                        clock = {name: value for name, value in progress.timing()._asdict().items() if value is not None}
                        metrics.log_timing(stage.name, number, clock)

            def save(position: dict[str, Any] | None) -> None:
                metrics.sync()
                notes = {"stage": stage.name, "step": step, "summaries": summaries | {stage.name: summary()}}
                store.save(step, state, notes | {"data": position, "n_logged": metrics.n_steps})
                judge.saved_step = step
                progress.pause()

            lengths: set[int] = set()
            pending = None
            while step < settings.steps and not (judge.stops if voted_step else stop.requested):
                seq_len = settings.seq_len_at(step)
                position = data.state()
                try:
                    batch = data.batch(first_batch + step, batch_size=settings.batch_size, seq_len=seq_len)
                except Exception as error:
                    message = f"there is no batch for step {step + 1} of stage {stage.name}: {error}"
                    if jax.process_count() == 1 and step > 0:
                        finish(pending)
                        if judge.saved_step != step:
                            save(position)
                            store.wait()
                        message += " The steps before it are saved; the same command goes on from there."
                    raise RunError(message) from error
                compiles = seq_len not in lengths
                lengths.add(seq_len)
                if compiles:
                    finish(pending)
                    pending = None
                placed = place_batch(batch)
                state, values = voted_step(state, placed, stop.requested) if voted_step else train_step(state, placed)
                # Metrics are read a step late, so that the device need not wait for the host.
                finish(pending)
                step += 1
                pending = (step, values, seq_len, compiles)
                if step % settings.checkpoint_every == 0 or step == settings.steps:
                    finish(pending)
                    pending = None
                    save(data.state())
            finish(pending)
            if step < settings.steps and judge.saved_step != step and step > 0:
                save(data.state())
            timing_totals = summary()
        store.wait()
    return StageResult(state.params, summaries | {stage.name: timing_totals}, step == settings.steps)


def _flops_per_token(config: ModelConfig, stage: Stage, seq_len: int) -> float | None:
    """As the model of costs counts them; None for a warm-up and the baselines, which it does not cover."""
    is_covered = stage.has_lm_loss and stage.attention in ("dense", "sparse")
    return training_flops_per_token(config, seq_len, stage.attention) if is_covered else None
