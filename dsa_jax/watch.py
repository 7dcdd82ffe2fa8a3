"""Held-out rows watched while a run trains: logged, in a report that grows, and a gate between warm-up and sparse stage."""

import logging
from typing import Any

from dsa_jax.config import Config, to_dict
from dsa_jax.evals.held_out import HeldOut, HeldOutResult, low_layers
from dsa_jax.report.report import write_progress
from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import MetricsLog
from dsa_jax.run.processes import on_main

_LOG = logging.getLogger(__name__)
_MOST_NAMED = 8


class Watch:
    """The looks of a run at held-out rows; every process takes part in them, the first one writes."""

    def __init__(self, run: RunDirectory, config: Config, held_out: HeldOut, metrics: MetricsLog) -> None:
        """`held_out` evaluates, `metrics` is the log of the run."""
        self._run, self._config, self._held_out, self._metrics = run, config, held_out, metrics

    def look(self, stage: str, step: int, params: Any) -> None:
        """Evaluate, say, log, and write report.html as far as it goes."""
        result = self._held_out(params)
        _LOG.info("%s %d, held out: %s", stage, step, _words(result))
        self._log(stage, step, result)

    def _log(self, stage: str, step: int, result: HeldOutResult) -> None:
        self._metrics.log_evaluation(stage, step, result.metrics())
        content = {"name": self._config.name, "config": to_dict(self._config)}
        on_main(lambda: write_progress(self._run.path, content))

    def gate(self, step: int, params: Any) -> int:
        """Between warm-up and sparse stage: warn, stop or extend, as `train.gate` says, where layers are below `gate_coverage`.

        Args:
            step: of the warm-up, of which these are the parameters; all steps so far are taken.
            params: the parameters.

        Returns:
            The steps that the warm-up is to go on for; 0: it is over.

        Raises:
            RunError: where the run is to stop; the warm-up is saved.
        """
        train = self._config.train
        result = self._held_out(params)
        low = low_layers(result.coverage, train.gate_coverage)
        _LOG.info("after the warm-up, held out: %s", _words(result))
        if train.gate == "extend" and not self._metrics.has_evaluation("warmup", step):
            self._log("warmup", step, result)
        if not low:
            return 0
        listed = ", ".join(f"{layer} ({result.coverage[layer]:.0%})" for layer in low[:_MOST_NAMED])
        more = f" and {len(low) - _MOST_NAMED} more" if len(low) > _MOST_NAMED else ""
        message = (
            f"after {step} steps of the warm-up, sparse keys hold less than {train.gate_coverage:.0%} of the attention "
            f"(train.gate_coverage) in {len(low)} of {len(result.coverage)} layers: {listed}{more}"
        )
        if n_more := train.gate_extension(step):
            end = train.warmup.n_steps + train.gate_extend_max
            _LOG.warning("%s. It goes on to step %d, and to %d at most (train.gate_extend_max)", message, step + n_more, end)
            return n_more
        message += f". More warm-up or a larger topk raises it{_or_dense(self._config, low)}"
        if train.gate == "stop":
            raise RunError(f"{message}. The warm-up is saved; train.gate=warn goes on.")
        _LOG.warning("%s", message)
        return 0


def _or_dense(config: Config, layers: list[int]) -> str:
    """The setting, of a run in another workdir, with which `layers` stay dense; empty where no other layer would be left."""
    n_dense = max(layers) + 1
    if len(layers) == config.model.n_layers or (config.init.hf_dir and n_dense == config.model.n_layers):
        return ""
    if not config.init.hf_dir:
        return "; 'dense' for them in model.attention.layer_types leaves them dense"
    those = "them" if n_dense == len(layers) else "them, and all before the last of them,"
    return f"; --config.init.dense_layers={n_dense} leaves {those} dense"


def _words(result: HeldOutResult) -> str:
    mean, error = result.difference
    n_not_finite = sum(result.by_layer.get("n_not_finite", ()))
    return (
        f"dense {result.dense_loss:.3f}, sparse {result.sparse_loss:.3f} nats per token ({mean:+.3f} ± {error:.3f}), coverage "
        f"{sum(result.coverage) / len(result.coverage):.3f}, lowest {min(result.coverage):.3f}"
        + (f"; {n_not_finite:.0f} queries with values that are not finite, over all layers" if n_not_finite else "")
    )
