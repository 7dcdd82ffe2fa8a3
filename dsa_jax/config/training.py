"""The stages of a recipe, the gate between them, and what is written while they run."""

import re
from dataclasses import dataclass, field

from dsa_jax.config.checks import ConfigError, shown
from dsa_jax.config.limits import (
    COUNT,
    FRACTION,
    Choices,
    Text,
    limited,
)
from dsa_jax.config.profile_steps import check_profiled_steps
from dsa_jax.config.selections import DENSE, is_by_indexer, selections
from dsa_jax.config.stage import StageConfig

STAGES = ("pretrain", "warmup", "sparse")
TRACKERS = ("tensorboard", "wandb", "trackio")
"""Where metrics go beside metrics.jsonl; each is an extra of this name."""


@dataclass
class TrainConfig:
    """The three stages of a retrofit and what they share."""

    pretrain: StageConfig = field(default_factory=StageConfig)
    warmup: StageConfig = field(default_factory=StageConfig)
    sparse: StageConfig = field(default_factory=StageConfig)
    pretrain_attention: str = limited(
        "dense", Choices(selections)
    )  # one of {selections}; where the indexer chooses the keys, its KL trains it, too
    sparse_attention: str = limited("sparse", Choices(selections))  # of the third stage; another name trains a baseline instead
    warmup_attention: str = limited(
        "dense", Choices(selections)
    )  # dense, or one in which the indexer chooses the keys: no dense attention, but it learns of no key that it does not pick
    sparse_trains: str = limited(
        "all", Choices(("all", "indexer"))
    )  # all | indexer: the third stage trains the indexer alone, by its KL, and leaves the base as it was loaded
    gate: str = limited(
        "off", Choices(("off", "warn", "stop", "extend"))
    )  # off | warn | stop | extend, where the warm-up left layers with less held-out coverage than gate_coverage
    gate_coverage: float = limited(0.8, FRACTION)  # share of the dense attention that the selected keys of a layer should hold
    gate_extend_steps: int = limited(100, COUNT)  # with extend: steps that the warm-up goes on for, at its last learning rate
    gate_extend_max: int = limited(1000, COUNT)  # with extend: such steps in all; layers that are low then are a warning
    nan_policy: str = limited("stop", Choices(("stop", "skip")))  # stop | skip (leave parameters untouched and count)
    max_skipped_steps: int = limited(10, COUNT)  # with skip: consecutive steps before stopping after all
    keep_checkpoints: int = limited(2, COUNT)  # per stage
    profile_steps: str = limited("", Text(20))  # FIRST:LAST, steps of each stage to trace into profile/STAGE; empty: none
    trackers: tuple[str, ...] = limited(
        (), Choices(TRACKERS)
    )  # of tensorboard, wandb, trackio (extras of these names): metrics go there, too
    tracker_project: str = limited("dsa-jax", Text(128))  # of wandb and trackio; the rest is said by their WANDB_*, TRACKIO_*

    def validate(self) -> None:
        if len(set(self.trackers)) != len(self.trackers):
            raise ConfigError(f"train.trackers names {shown(', '.join(self.trackers))}; expected each tracker once.")
        if not re.fullmatch(r"\w[\w. -]*", self.tracker_project):
            raise ConfigError(
                f"train.tracker_project is {shown(self.tracker_project)}; expected letters, digits, '.', '-', '_' and spaces."
            )
        for name in STAGES:
            getattr(self, name).validate(f"train.{name}")
        check_profiled_steps(self.profile_steps, {name: stage for name in STAGES if (stage := getattr(self, name)).n_steps})
        if self.warmup_attention != DENSE and not is_by_indexer(self.warmup_attention):
            choices = ", ".join(name for name in selections() if is_by_indexer(name))
            raise ConfigError(
                f"train.warmup_attention is {self.warmup_attention!r}; expected dense, or an attention in which the indexer "
                f"chooses the keys: {choices}."
            )
        if self.sparse_trains == "indexer" and not is_by_indexer(self.sparse_attention):
            raise ConfigError(
                f"train.sparse_trains is 'indexer' with train.sparse_attention {self.sparse_attention!r}, in which no indexer "
                "learns; expected an attention in which it chooses the keys, such as 'sparse', or train.sparse_trains='all'."
            )
        alone = ["warmup", *(["sparse"] if self.sparse_trains == "indexer" else [])]
        for name in alone:
            stage = getattr(self, name)
            if stage.n_steps and not stage.indexer_loss_weight:
                raise ConfigError(
                    f"train.{name}.indexer_loss_weight is 0 in a stage that trains the indexer alone, which then learns "
                    f"nothing; expected more than 0. Leave the stage out with train.{name}.steps=0."
                )
        last = self.warmup.optimizer
        if self.gate == "extend" and self.warmup.n_steps and last.schedule != "constant" and not last.final_fraction:
            raise ConfigError(
                "train.warmup.optimizer.final_fraction is 0 with train.gate 'extend', whose steps would have a learning rate "
                "of 0; expected more than 0, or train.warmup.optimizer.schedule='constant'."
            )

    def steps_to_gate(self, stage: str, taken: int) -> int:
        """The number of steps at which `stage`, `taken` of them done, ends or meets its gate: more than its own if extended."""
        n_steps = getattr(self, stage).n_steps
        if stage != "warmup" or taken <= n_steps:
            return n_steps
        if self.gate != "extend":
            return taken
        rounds = -(-(taken - n_steps) // self.gate_extend_steps)
        return max(taken, n_steps + min(rounds * self.gate_extend_steps, self.gate_extend_max))

    def gate_extension(self, taken: int) -> int:
        """Steps that a gate at `taken` steps of the warm-up, which it does not pass, adds; 0 where it may add none."""
        left = self.warmup.n_steps + self.gate_extend_max - taken
        return max(0, min(self.gate_extend_steps, left)) if self.gate == "extend" else 0
