"""Configuration as nested dataclasses: one tree, every field overridable from the command line.

The dataclasses stay unfrozen because flag overrides are assigned after construction; call `Config.validate()` once they
have been. Lengths are in tokens, learning rates are absolute, fractions lie in [0, 1].
"""

import copy
from dataclasses import dataclass, field

from dsa_jax.config.checks import ConfigError
from dsa_jax.config.data import DataConfig
from dsa_jax.config.evaluation import ARGMAX, GENERATION, GENERATION_ROOM, EvalConfig
from dsa_jax.config.fields import check_kinds
from dsa_jax.config.limits import (
    AMOUNT,
    PATH,
    SEED,
    Choices,
    Text,
    limited,
)
from dsa_jax.config.model import ModelConfig
from dsa_jax.config.parallel import ParallelConfig
from dsa_jax.config.selections import DENSE
from dsa_jax.config.training import STAGES, TrainConfig


@dataclass
class InitConfig:
    """Where the parameters come from; empty: random."""

    checkpoint: str = limited("", PATH)  # a run directory; its parameters are taken, an indexer it lacks is initialised
    stage: str = limited(
        "", Choices(STAGES, or_empty=True)
    )  # of that run: pretrain, warmup or sparse; empty: the furthest that it has
    hf_dir: str = limited(
        "", PATH
    )  # a Hugging Face directory, or ORG/NAME on the hub; it decides the model, which gets the recipe's indexer
    dense_layers: int = limited(0, AMOUNT)  # first layers of hf_dir that stay dense and get no indexer
    scale_new_indexers: bool = True  # divide a new indexer's initial weights by the rms of its layer's input-norm gain

    def validate(self) -> None:
        if self.checkpoint and self.hf_dir:
            raise ConfigError(
                f"init.checkpoint ({self.checkpoint}) and init.hf_dir ({self.hf_dir}) are both given; expected at most one."
            )
        if self.dense_layers and not self.hf_dir:
            raise ConfigError(
                f"init.dense_layers is {self.dense_layers} without init.hf_dir; expected 0. Name every layer in "
                "model.attention.layer_types."
            )
        if self.stage and not self.checkpoint:
            raise ConfigError(f"init.stage is {self.stage!r} without init.checkpoint. Give the run that has the stage.")


@dataclass
class Config:
    """Everything a run needs."""

    name: str = limited("unnamed", Text(200))  # of the recipe, in reports and trackers
    seed: int = limited(0, SEED)  # of new parameters, batches and synthetic rows
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: InitConfig = field(default_factory=InitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def laid_out(self) -> "Config":
        """A copy in which `train.STAGE.accumulation` and `eval.batch_size` of 0 are the numbers that the layout gives.

        Both leave one row to each device, the least that a mesh can split: the memory of a step then does not depend on the
        batch. A batch that does not divide by the devices is left whole, for `dsa_jax.parallel.check` to refuse.
        """
        config, n_parts = copy.deepcopy(self), self.parallel.row_parts
        for stage in (getattr(config.train, name) for name in STAGES):
            if not stage.accumulation:
                stage.accumulation = 1 if stage.batch_size % n_parts else stage.batch_size // n_parts
        config.eval.batch_size = config.eval.batch_size or n_parts
        return config

    def validate(self) -> None:
        """Check every field against the others.

        Raises:
            ConfigError: naming the first field that cannot work.
        """
        check_kinds(self)
        self.model.validate()
        self.data.validate()
        self.train.validate()
        self.eval.validate()
        self.init.validate()
        self.parallel.validate()
        tasks = {name for name, _ in self.data.tasks} | set(self.eval.tasks)
        if "multi_needle" in tasks and self.data.task.n_asked > self.data.task.n_needles:
            raise ConfigError(
                f"data.task.n_asked is {self.data.task.n_asked}; expected at most data.task.n_needles "
                f"({self.data.task.n_needles}), the needles that there are."
            )
        for name in ("pretrain", "sparse"):
            if getattr(self.train, name).n_steps:
                field_name = f"{name}_attention"
                self.model.attention.check_can_run(f"train.{field_name}", getattr(self.train, field_name))
        if self.model.attention.indexer.enabled and "coarse_to_fine" in self.eval.rows:
            self.model.attention.check_can_run("eval.rows", "coarse_to_fine")
        attention, warmup = self.model.attention, self.train.warmup_attention
        if self.train.warmup.n_steps and warmup != DENSE:
            attention.check_can_run("train.warmup_attention", warmup)
            if attention.indexer.coarse_loss_weight:
                raise ConfigError(
                    f"model.attention.indexer.coarse_loss_weight is {attention.indexer.coarse_loss_weight} with "
                    f"train.warmup_attention {warmup!r}; expected 0, since that loss compares blocks with the dense attention."
                )
        if self.train.warmup.n_steps and not self.model.attention.indexer.enabled:
            raise ConfigError(
                f"train.warmup.{'tokens' if self.train.warmup.tokens else 'steps'} is positive, but the model has no indexer. "
                "Set model.attention.indexer.enabled=True."
            )
        stages = {name: stage for name in STAGES if (stage := getattr(self.train, name)).n_steps}
        used = {"recall": self.eval.recall_sequences, "text": self.eval.text_sequences, "task": self.eval.tasks}
        lengths = {f"train.{name}.seq_len": stage.longest for name, stage in stages.items()}
        lengths |= {f"eval.{name}_len": getattr(self.eval, f"{name}_len") for name, is_used in used.items() if is_used}
        if self.eval.text_tasks:
            lengths["eval.text_task_lens"] = max(self.eval.text_task_lens)
            if self.eval.text_task_scoring != ARGMAX:
                generated = f"eval.text_task_lens with the {GENERATION_ROOM} that text_task_scoring={GENERATION} may write"
                lengths[generated] = lengths["eval.text_task_lens"] + GENERATION_ROOM
        longest, limit = max(lengths.values(), default=0), self.model.max_positions
        if longest > limit:
            too_long = ", ".join(f"{name} is {length}" for name, length in lengths.items() if length > limit)
            is_placeholder = self.data.text.tokenizer == "checkpoint" and not self.init.hf_dir
            hint = " Give --config.init.hf_dir=DIR, which brings the model." if is_placeholder else " Shorten what is longer."
            raise ConfigError(
                f"model.max_positions is {limit}; expected at least the longest sequence used ({longest}): {too_long}.{hint}"
            )
