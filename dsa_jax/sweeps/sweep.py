"""A sweep: a question, a base recipe, and variants of it."""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsa_jax.config import AttentionConfig, Config, ConfigError, IndexerConfig, ModelConfig, StageConfig, to_dict
from dsa_jax.config.attention import FULL, SHARED, base_kind, unused_fields
from dsa_jax.config.checks import random_seed
from dsa_jax.config.fields import flatten, set_field


@dataclass(frozen=True)
class Variant:
    """The base recipe with some fields changed.

    Fields: `name` in table and plot; `settings` the changed fields by dotted path; `row` its row of the parity table (a key of
    `dsa_jax.config.selections.eval_rows`); `place` on the horizontal axis, None where variants have no order. Variants with
    equal `settings` share one training run. `at_evaluation` are fields changed after training only; `change_params` maps its
    parameters and the model's config to other parameters: a function of a module, identified in the results by its name.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    row: str = "sparse"
    place: int | float | None = None
    at_evaluation: Mapping[str, Any] = field(default_factory=dict)
    change_params: Callable[[dict[str, Any], ModelConfig], dict[str, Any]] | None = None

    @property
    def retains_run(self) -> bool:
        """Whether the trained run is evaluated unchanged."""
        return not self.at_evaluation and self.change_params is None


@dataclass
class Ablation:
    """A sweep. Its result is one figure: the variants side by side, every seed a point."""

    name: str = "unnamed"
    question: str = ""  # heads the table and the plot
    axis: str = "variant"  # title of the differing setting, with unit
    seeds: tuple[int, ...] = (0, 1, 2)
    base: Config = field(default_factory=Config)
    variants: tuple[Variant, ...] = field(default=(), metadata={"flag": False})

    def config(self, variant: Variant, seed: int) -> Config:
        """The recipe of one run.

        Raises:
            ConfigError: for a setting that names no field, with the nearest name.
        """
        config = copy.deepcopy(self.base)
        config.name, config.seed = variant.name, seed
        for path, value in variant.settings.items():
            set_field(config, path, value)
        return config

    def key(self, variant: Variant, seed: int) -> str:
        """Ten hexadecimal digits that equal runs share, whatever their names and sweeps."""
        own = run_key(self.config(variant, seed))
        if variant.retains_run:
            return own
        change = variant.change_params
        return _digest([own, dict(variant.at_evaluation), change.__qualname__ if change else ""])

    def validate(self) -> None:
        """Check the sweep and the recipe of each variant.

        Raises:
            ConfigError: naming the fault and the variant.
        """
        is_name = re.fullmatch(r"[^./\\\s\x00-\x1f\ud800-\udfff][^/\\\x00-\x1f\ud800-\udfff]*", self.name)
        if not is_name or len(self.name.encode()) > 200:
            raise ConfigError(
                f"name is {self.name!r:.60}; expected the name of files in --results: at most 200 bytes, neither / nor \\ "
                "among them, and no dot or space first."
            )
        if not self.variants or not self.seeds:
            raise ConfigError(f"ablation {self.name}: it has {len(self.variants)} variants and {len(self.seeds)} seeds.")
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names) or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"ablation {self.name}: variants {names} and seeds {self.seeds} must each be distinct.")
        for seed in self.seeds:
            random_seed("seed", seed)
        for variant in self.variants:
            config = self.config(variant, self.seeds[0])
            if variant.change_params and "<" in variant.change_params.__qualname__:
                raise ConfigError(
                    f"ablation {self.name}, variant {variant.name!r}: change_params is {variant.change_params.__qualname__}, "
                    "which has no name of its own to tell its results from others by. Define it at the top of a module."
                )
            try:
                config.validate()
                evaluation_config(config, variant).validate()
            except ConfigError as error:
                raise ConfigError(f"ablation {self.name}, variant {variant.name!r}: {error}") from error
            if variant.retains_run and variant.row not in config.eval.rows:
                raise ConfigError(
                    f"ablation {self.name}, variant {variant.name!r}: its row is {variant.row!r}, but eval.rows is "
                    f"{config.eval.rows}. Add it there."
                )


def differences(config: Config, default: Config | None = None) -> dict[str, Any]:
    """The fields of `config` that are not at their defaults, by dotted path.

    A field added to Config later leaves it unchanged.
    """
    ours, theirs = (flatten(to_dict(c)) for c in (config, default or Config()))
    return {path: value for path, value in ours.items() if value != theirs.get(path)}


def evaluation_config(config: Config, variant: Variant) -> Config:
    """`config` as `variant` evaluates it."""
    config = copy.deepcopy(config)
    for path, value in variant.at_evaluation.items():
        set_field(config, path, value)
    return config


# Names and logging intervals do not change what a run computes.
_WITHOUT_EFFECT = ("log_every", "checkpoint_every", "keep_checkpoints", "profile_steps", "trackers", "tracker_project")


def run_key(config: Config) -> str:
    """Ten hexadecimal digits that equal recipes share, whatever their names."""
    changed = differences(config).items()
    return _digest({p: v for p, v in changed if p != "name" and p.rsplit(".", 1)[-1] not in _WITHOUT_EFFECT})


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def dense_part(config: Config) -> Config | None:
    """The dense pretraining of a recipe as a recipe of its own, the same for all variants of a retrofit.

    None where there is nothing to share: no pretraining, nothing after it, or pretraining that is sparse already.
    """
    train = config.train
    has_more = train.warmup.n_steps or train.sparse.n_steps
    if train.pretrain_attention != "dense" or not train.pretrain.n_steps or not has_more:
        return None
    dense = copy.deepcopy(config)
    dense.name = "dense"
    attention = dense.model.attention
    attention.indexer, attention.kind = IndexerConfig(), base_kind(attention.kind)
    for name in unused_fields(attention.kind):
        setattr(attention, name, getattr(AttentionConfig(), name))
    attention.layer_types = tuple(FULL if each == SHARED else each for each in attention.layer_types)
    if set(attention.layer_types) == {FULL}:
        attention.layer_types = ()
    dense.train.warmup, dense.train.sparse = StageConfig(), StageConfig()
    dense.train.warmup_attention, dense.train.sparse_attention, dense.train.sparse_trains = "dense", "sparse", "all"
    dense.train.profile_steps = ""
    dense.eval.rows = ("dense",)
    return dense


def after_dense(config: Config, dense_run: str) -> Config:
    """The rest of a recipe whose dense part is the run directory `dense_run`."""
    rest = copy.deepcopy(config)
    rest.train.pretrain = StageConfig()
    rest.init.checkpoint = dense_run
    return rest
