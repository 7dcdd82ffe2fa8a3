"""Metrics of finished steps: the policy on non-finite values, and the log."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dsa_jax.config import Config, StageConfig
from dsa_jax.run.checkpoints import latest_position
from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.files import RunError
from dsa_jax.run.metrics import MetricsLog
from dsa_jax.train.stages import Stage

_LOG = logging.getLogger(__name__)
_SHOWN = {
    "loss": "loss",
    "kl": "kl",
    "grad_norm_base": "base gradient",
    "grad_norm_indexer": "indexer gradient",
    "learning_rate_base": "base rate",
    "learning_rate_indexer": "indexer rate",
}
"""Metrics of the progress line with their names there."""
_LOSSES = ("loss", "kl_layers")
_COUNTERS = ("is_finite", "skipped_in_a_row", "stop")


class NotFiniteError(RunError):
    """A loss, gradient or update became NaN or infinite and the policy is to stop."""


@dataclass
class Judge:
    """Reads the metrics of finished steps, applies the policy on non-finite values, and logs.

    Attributes:
        saved_step: the last checkpoint of the stage; None before its first.
        final: the metrics logged last.
        stops: whether a process has voted to stop.
        extended_to: the steps of a stage whose gate has added some; 0: none.
    """

    run: RunDirectory
    stage: Stage
    config: Config
    metrics: MetricsLog
    saved_step: int | None
    final: dict[str, float]
    stops: bool = False
    extended_to: int = 0

    def take(self, step: int, values: dict[str, jax.Array]) -> dict[str, float]:
        """Judge and log the 1-based `step`; returns what the progress line shows.

        Raises:
            NotFiniteError: by `train.nan_policy`.
        """
        read = jax.device_get(values)
        self.stops |= bool(read.get("stop", False))
        if not read["is_finite"]:
            self._not_finite(step, read)
        record = {name: float(value) for name, value in sorted(read.items()) if not value.ndim and name not in _COUNTERS}
        record |= {f"kl_layer_{i}": float(value) for i, value in enumerate(read.get("kl_layers", ()))}
        settings: StageConfig = getattr(self.config.train, self.stage.name)
        record["tokens"] = settings.tokens_after(step)
        if self.extended_to:
            record["extended_to"] = self.extended_to
        if step % settings.log_every == 0 or step == (self.extended_to or settings.n_steps):
            self.metrics.log(self.stage.name, step, record)
            self.final = record
        return {shown: record[name] for name, shown in _SHOWN.items() if name in record}

    def _not_finite(self, step: int, read: Mapping[str, Any]) -> None:
        in_a_row = int(read["skipped_in_a_row"])
        where, last = f"stage {self.stage.name}, step {step}", self._last_checkpoint()
        advice = f"Lower train.{self.stage.name}.optimizer.learning_rate"
        losses = [value for name in _LOSSES if name in read for value in np.ravel(read[name])]
        if in_a_row == step and (bad := [value for value in losses if not np.isfinite(value)]):
            # No update of this stage has changed a parameter yet.
            advice = (
                f"The loss is {bad[0]} before the first update, so a lower learning rate would not help: with the parameters "
                "it starts from the model overflows. Check the scales, norm_eps and rope of model.*, or set "
                "model.dtype=float32"
            )
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
