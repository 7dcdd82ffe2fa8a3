"""The training loop of one stage: batches, updates, logging, checkpoints and signals."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ModelConfig, StageConfig
from dsa_jax.config.profile_steps import profiled_steps
from dsa_jax.costs.model import training_flops_per_token
from dsa_jax.costs.ops import peaks_of
from dsa_jax.data import Batch, TrainData
from dsa_jax.model import Transformer, abstract_params
from dsa_jax.parallel.placement import place, place_batch, with_shardings
from dsa_jax.rehearsal import abstract_batch, rehearse
from dsa_jax.run.checkpoints import CheckpointStore
from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import MetricsLog
from dsa_jax.run.processes import is_main, with_votes
from dsa_jax.run.profile import StepProfile
from dsa_jax.run.progress import Discard, Progress
from dsa_jax.run.signals import StopRequest
from dsa_jax.train.judge import Judge
from dsa_jax.train.stages import Stage
from dsa_jax.train.step import TrainState, init_state, make_train_step

_LOG = logging.getLogger(__name__)
_TOTALS = ("seconds", "compile_seconds", "tokens", "timed_tokens")


Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


class Training(NamedTuple):
    """State that the stages of a run share: `stop` is set by a signal, `metrics` is the run's log.

    `steps` holds the steps of the stages that `rehearsed_steps` has traced; `look` is called with the stage, the step and the
    parameters after every `evaluate_every` steps. A stage among `gates` is done when its gate, called with the step and the
    parameters after the last one, adds no more steps.
    """

    run: RunDirectory
    config: Config
    model: Transformer
    data: TrainData
    stop: StopRequest
    metrics: MetricsLog
    steps: Mapping[str, Step]
    look: Callable[[str, int, Any], None]
    gates: Mapping[str, Callable[[int, Any], int]]


class StageResult(NamedTuple):
    """Result of one stage: parameters, report entries of this and earlier stages, its steps, and whether it completed."""

    params: dict[str, Any]
    summaries: dict[str, dict[str, Any]]
    n_steps: int
    is_complete: bool


def rehearsed_steps(model: Transformer, stages: Iterable[Stage], config: Config) -> dict[str, Step]:
    """The training steps of `stages` by name, each traced for every length that it will see, without computing.

    Raises:
        ConfigError: for the first that cannot be computed.
    """
    steps, params = {}, abstract_params(model)
    for stage in stages:
        settings: StageConfig = getattr(config.train, stage.name)
        steps[stage.name] = make_train_step(model, stage, config)
        state = with_shardings(jax.eval_shape(lambda p, of=stage, by=settings: init_state(p, of, by), params))
        for seq_len in sorted(settings.lengths):
            batch = abstract_batch(settings.batch_size, seq_len)
            rehearse(
                f"a step of stage {stage.name} (train.{stage.name}.batch_size {settings.batch_size}, {seq_len} tokens)",
                *(steps[stage.name], state, batch),
            )
    return steps


def run_stage(
    training: Training,
    stage: Stage,
    params: dict[str, Any],
    *,
    resume_step: int | None,
    summaries: dict[str, dict[str, Any]],
) -> StageResult:
    """Train `stage` from its start, or resume it at its checkpoint `resume_step`, to its end or a stop request.

    Batches are a function of (seed, step), or of the position in the text that is saved with the state, and the state is
    restored bit for bit, so a resumed stage equals an uninterrupted one. On a stop request the step in progress is finished and
    saved. With several processes a request to any one stops all of them, one step later.

    Args:
        training: shared state; entries of its log after the resumed step are dropped.
        stage: which stage.
        params: parameters at the start of the stage, donated: a second copy would not fit beside a large model. With
            `resume_step` only their structure counts.
        resume_step: a valid checkpoint of this stage, or None.
        summaries: of the earlier stages: steps, seconds, compile_seconds, tokens, those timed without compilation, and final
            metrics by stage name.

    Raises:
        NotFiniteError: by `train.nan_policy`.
        RunError: where there is no batch for a step; the steps before it are saved (by a single process). Where the gate of the
            stage stops the run; all its steps are saved.
        StageCheckpointError: where saving or restoring fails.
    """
    config, data, stop = training.config, training.data, training.stop
    settings: StageConfig = getattr(config.train, stage.name)
    with CheckpointStore(training.run.checkpoint_dir(stage.name), keep=config.train.keep_checkpoints) as store:
        stage_run = _StageRun(training, stage, store, params, resume_step, summaries)
        take_step = _with_votes(training.steps[stage.name])
        flops: dict[int, float | None] = {}  # of a step, by sequence length
        with stage_run.progress, contextlib.closing(stage_run):
            while stage_run.goes_on() and not stage_run.stops():
                seq_len = settings.seq_len_at(stage_run.step)
                batch = stage_run.next_batch(seq_len)
                compiles = seq_len not in flops
                if compiles:
                    flops[seq_len] = _step_flops(config.model, stage, settings.batch_size, seq_len)
                    # Compiling blocks the host: report the step before it first, so that its time excludes it.
                    stage_run.report()
                stage_run.prepare_profile(compiles=compiles)
                with stage_run.profile.around(stage_run.step + 1):
                    stage_run.state, metrics = take_step(stage_run.state, place_batch(batch), stop.requested)
                # Metrics are read one step late, so that the device does not wait for the host.
                stage_run.report()
                stage_run.step += 1
                tokens = settings.batch_size * seq_len
                stage_run.pending = _Pending(stage_run.step, metrics, tokens, flops[seq_len], compiles)
                if stage_run.profile.ends_after(stage_run.step):
                    stage_run.between_steps(stage_run.profile.stop)
                if settings.evaluate_every and stage_run.step % settings.evaluate_every == 0:
                    stage_run.look()
                if stage_run.step % settings.checkpoint_every == 0:
                    stage_run.save(data.state())
            stage_run.save(data.state())
            summaries = stage_run.summaries | {stage.name: stage_run.summary()}
        store.wait()
    return StageResult(stage_run.state.params, summaries, stage_run.n_steps, stage_run.is_complete)


class _Pending(NamedTuple):
    """A dispatched step whose metrics are still to be read; `flops` is None where unknown."""

    step: int
    metrics: dict[str, jax.Array]
    tokens: int
    flops: float | None
    compiled: bool


class _StageRun:
    """A stage in progress: the state after `step` steps, with its log, progress line and checkpoints.

    `summaries` are those of earlier stages, and of this one that of earlier processes. `n_steps` are the steps of the stage as
    far as its gate has added any; `is_complete` says that they are taken and that the gate adds no more.
    """

    def __init__(
        self,
        training: Training,
        stage: Stage,
        store: CheckpointStore,
        params: dict[str, Any],
        resume_step: int | None,
        summaries: dict[str, dict[str, Any]],
    ) -> None:
        """Start or resume as `run_stage` describes; the clock starts here."""
        run, config, self.training = training.run, training.config, training
        self.data, self.stop, self.metrics = training.data, training.stop, training.metrics
        self.stage, self.store, self.step, self.summaries = stage, store, resume_step or 0, summaries
        self.settings: StageConfig = getattr(config.train, stage.name)
        self.n_steps, self.is_complete = config.train.steps_to_gate(stage.name, self.step), False
        if resume_step is None:
            self.state = place(init_state(params, stage, self.settings))
            self.metrics.truncate_after(STAGE_ORDER, stage.name, 0)
            _LOG.info("stage %s: %d steps, %d tokens", stage.name, self.n_steps, self.settings.tokens_after(self.n_steps))
        else:
            self._resume(resume_step, params)
        self.before = self.summaries.get(stage.name, {})
        self.first_batch = _first_batch(self.summaries, stage)
        self.judge = Judge(run, stage, config, self.metrics, saved_step=resume_step, final=self.before.get("final", {}))
        if self.n_steps > self.settings.n_steps:
            self.judge.extended_to = self.n_steps
        self.progress = self._make_progress()
        directory = run.profile_dir(stage.name) if is_main() else None
        self.profile = StepProfile(directory, profiled_steps(config.train.profile_steps))
        self.pending: _Pending | None = None

    def close(self) -> None:
        """End a trace that a stop request, or an error, has cut short."""
        self.profile.stop()

    def prepare_profile(self, *, compiles: bool) -> None:
        """Start or end the trace before the next step."""
        if self.profile.ends_before(compiles=compiles):
            self.between_steps(self.profile.stop)
        elif self.profile.starts_at(self.step + 1, compiles=compiles):
            self.between_steps(self.profile.start)

    def between_steps(self, act: Callable[[], None]) -> None:
        """Do something with no step in progress, which the clock of the stage excludes."""
        self.report()
        act()
        self.progress.pause()

    def _resume(self, step: int, params: dict[str, Any]) -> None:
        """Restore the checkpoint of `step`; `params` gives its structure and shapes."""
        abstract = with_shardings(jax.eval_shape(lambda p: init_state(p, self.stage, self.settings), params))
        _, self.state, notes = self.store.restore(step, abstract)
        self.summaries = notes["summaries"]
        self.data.restore(notes.get("data"))
        _LOG.info("stage %s continues at step %d of %d", self.stage.name, step, self.n_steps)
        self.metrics.truncate_after(STAGE_ORDER, self.stage.name, step)
        n_logged = notes.get("n_logged")
        if is_main() and n_logged is not None and self.metrics.n_steps != n_logged:
            _LOG.warning(
                "%s holds %d steps up to here, and %d were logged: the report's curves will lack the others",
                *(self.metrics.path, self.metrics.n_steps, n_logged),
            )

    def _make_progress(self) -> Progress:
        peaks, settings = peaks_of(jax.devices()[0].device_kind), self.settings
        return Progress(
            self.stage.name,
            self.n_steps,
            start_step=self.step,
            stream=None if is_main() else Discard(),
            peak_flops=peaks and peaks.flops * jax.device_count(),
            tokens_left=lambda done: settings.tokens_after(self.n_steps) - settings.tokens_after(done),
        )

    def stops(self) -> bool:
        """Whether to stop before the next step: several processes stop together, by the vote that all have read."""
        return self.judge.stops if jax.process_count() > 1 else self.stop.requested

    def goes_on(self) -> bool:
        """Whether there is a step to take: after the last one all are saved, and the gate of the stage may add more.

        A stop request comes before the gate, which the next process then meets.

        Raises:
            RunError: where the gate stops the run.
        """
        if self.step < self.n_steps:
            return True
        self.save(self.data.state())
        gate = self.training.gates.get(self.stage.name)
        if gate is not None:
            if self.stops():
                return False
            self.n_steps += gate(self.step, self.state.params)
            self.progress.pause()
        self.is_complete = self.step == self.n_steps
        if not self.is_complete:
            self.judge.extended_to = self.n_steps
            self.progress.extend(self.n_steps)
        return not self.is_complete

    def next_batch(self, seq_len: int) -> Batch:
        """The batch of the next step.

        Raises:
            RunError: where there is none; a single process has saved the steps before it.
        """
        position = self.data.state()
        try:
            return self.data.batch(self.first_batch + self.step, batch_size=self.settings.batch_size, seq_len=seq_len)
        except Exception as error:
            message = f"there is no batch for step {self.step + 1} of stage {self.stage.name}: {error}"
            if jax.process_count() == 1 and self.step > 0:
                self.save(position)
                self.store.wait()
                message += " The steps before it are saved; the same command continues from there."
            raise RunError(message) from error

    def report(self) -> None:
        """Judge, log and show the pending step, if there is one."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        shown = self.judge.take(pending.step, pending.metrics)
        self.progress.update(
            pending.step,
            tokens=pending.tokens,
            values=shown,
            compiled=pending.compiled,
            flops=pending.flops,
            seen=self.settings.tokens_after(pending.step),
        )
        if pending.step % self.settings.log_every == 0:
            clock = {name: value for name, value in self.progress.timing()._asdict().items() if value is not None}
            self.metrics.log_timing(self.stage.name, pending.step, clock)

    def look(self) -> None:
        """Look at held-out rows, which the clock of the stage excludes."""
        self.report()
        self.training.look(self.stage.name, self.step, self.state.params)
        self.progress.pause()

    def save(self, position: dict[str, Any] | None) -> None:
        """Report, and save unless this step is saved; `position` is that in the text after the batches taken."""
        self.report()
        if self.step in (0, self.judge.saved_step):
            return
        self.metrics.sync()
        notes = {"stage": self.stage.name, "step": self.step, "summaries": self.summaries | {self.stage.name: self.summary()}}
        self.store.save(self.step, self.state, notes | {"data": position, "n_logged": self.metrics.n_steps})
        self.judge.saved_step = self.step
        self.progress.pause()

    def summary(self) -> dict[str, Any]:
        """The report entry of this stage so far, earlier processes included."""
        timing = self.progress.timing()
        totals = {name: self.before.get(name, 0) + getattr(timing, name) for name in _TOTALS}
        return {"steps": self.step, **totals, "final": self.judge.final}


def _with_votes(step: Step) -> Callable[[TrainState, Batch, bool], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step; with several processes it also reduces their votes on whether to stop."""
    return with_votes(step) if jax.process_count() > 1 else lambda state, batch, _: step(state, batch)


def _first_batch(summaries: Mapping[str, Mapping[str, Any]], stage: Stage) -> int:
    """Index of the batch of step 0: a stage continues with the batches after those that the stages before have taken."""
    earlier = STAGE_ORDER[: STAGE_ORDER.index(stage.name)]
    return sum(summaries[name]["steps"] for name in earlier if name in summaries)


def _step_flops(config: ModelConfig, stage: Stage, batch_size: int, seq_len: int) -> float | None:
    """FLOPs of a step by the cost model; None for a warm-up and the baselines, which it does not cover."""
    is_covered = stage.has_lm_loss and stage.attention in ("dense", "sparse")
    return batch_size * seq_len * training_flops_per_token(config, seq_len, stage.attention) if is_covered else None
