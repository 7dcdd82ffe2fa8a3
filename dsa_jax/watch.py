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
        self._metrics.log_evaluation(stage, step, result.metrics())
        content = {"name": self._config.name, "config": to_dict(self._config)}
        on_main(lambda: write_progress(self._run.path, content))

    def gate(self, params: Any) -> None:
        """Between warm-up and sparse stage: warn or stop, as `train.gate` says, where layers are below `train.gate_coverage`.

        Raises:
            RunError: where the run is to stop; the warm-up is saved.
        """
        train = self._config.train
        if train.gate == "off":
            return
        result = self._held_out(params)
        low = low_layers(result.coverage, train.gate_coverage)
        _LOG.info("after the warm-up, held out: %s", _words(result))
        if not low:
            return
        listed = ", ".join(f"{layer} ({result.coverage[layer]:.0%})" for layer in low[:_MOST_NAMED])
        more = f" and {len(low) - _MOST_NAMED} more" if len(low) > _MOST_NAMED else ""
        message = (
            f"after the warm-up, sparse keys hold less than {train.gate_coverage:.0%} of the attention (train.gate_coverage) "
            f"in {len(low)} of {len(result.coverage)} layers: {listed}{more}. More warm-up, a larger topk, or dense layers "
            "(init.dense_layers, model.attention.layer_types) raise it"
        )
        if train.gate == "stop":
            raise RunError(f"{message}. The warm-up is saved; train.gate=warn goes on.")
        _LOG.warning("%s", message)


def _words(result: HeldOutResult) -> str:
    mean, error = result.difference
    n_not_finite = sum(result.by_layer.get("n_not_finite", ()))
    return (
        f"dense {result.dense_loss:.3f}, sparse {result.sparse_loss:.3f} nats per token ({mean:+.3f} ± {error:.3f}), coverage "
        f"{sum(result.coverage) / len(result.coverage):.3f}, lowest {min(result.coverage):.3f}"
        + (f"; {n_not_finite:.0f} queries with values that are not finite, over all layers" if n_not_finite else "")
    )
