"""Configuration as nested dataclasses: one tree, every field overridable from the command line.

The dataclasses stay unfrozen because flag overrides are assigned after construction; call `Config.validate()` once they
have been. Lengths are in tokens, learning rates are absolute, fractions lie in [0, 1].
"""

import copy
import math
import re
from dataclasses import dataclass, field

from dsa_jax.config.checks import ConfigError, fraction, one_of, shown
from dsa_jax.config.fields import check_kinds
from dsa_jax.config.limits import (
    AMOUNT,
    COUNT,
    FRACTION,
    INT32,
    LENGTH,
    PATH,
    ROWS,
    ROWS_IF_SET,
    SEED,
    WEIGHT,
    Choices,
    Range,
    Text,
    limited,
)
from dsa_jax.config.model import ModelConfig
from dsa_jax.config.profile_steps import check_profiled_steps
from dsa_jax.config.selections import DENSE, eval_rows, is_by_indexer, selections

STAGES = ("pretrain", "warmup", "sparse")
AXES = ("data", "fsdp", "expert", "tensor", "context")
"""Axes of the device mesh, outermost first."""
TASKS = (
    "recall",
    "mqar",
    "passkey",
    "multi_needle",
    "variable_tracking",
    "common_words",
    "frequent_words",
)
"""Synthetic tasks. The place of a name decides the id of its leading token, so new ones are added at the end."""
TEXT_TASKS = (
    "needle",
    "needle_multikey",
    "needle_multivalue",
    "needle_multiquery",
    "text_variables",
    "text_common_words",
    "text_frequent_words",
    "text_quote",
)
"""Tasks in plain words among held-out text, for models that know language. The place of a name is part of its rows' seed."""
TRACKERS = ("tensorboard", "wandb", "trackio")
"""Where metrics go beside metrics.jsonl; each is an extra of this name."""
ARGMAX, GENERATION, BOTH = "argmax", "generation", "both"
"""Scorings of text tasks: every token of an answer, given those before it; the answer in generated text; a column for each."""
GENERATION_ROOM = 64
"""Positions behind a row of a text task that its generated answers may take."""
BATCH_AXES = ("data", "fsdp", "expert")
"""Axes over which the rows of a batch are split."""
_AXIS_OF = {"dp": "data", "fsdp": "fsdp", "ep": "expert", "tp": "tensor", "cp": "context"}


@dataclass
class RecallConfig:
    """Record-token recall: the vocabulary of the task and how densely records are scattered."""

    n_keys: int = limited(32, ROWS)
    n_values: int = limited(8, ROWS)
    n_fillers: int = limited(64, ROWS)
    tokens_per_record: int = limited(16, ROWS)  # a sequence of length L holds L // tokens_per_record records


@dataclass
class TaskConfig:
    """Sizes of the synthetic tasks other than recall, whose tokens they share; the same at all lengths but short ones."""

    n_needles: int = limited(
        16, ROWS
    )  # records of a multi_needle row, pairs of an mqar row; at most one per recall.tokens_per_record
    n_asked: int = limited(8, ROWS)  # needles that a multi_needle row asks for; the others distract
    n_chains: int = limited(4, ROWS)  # variable_tracking: chains of assignments in a row
    n_hops: int = limited(3, Range(0, 2**20))  # variable_tracking: assignments that follow the first of a chain
    n_answers: int = limited(4, ROWS)  # common_words, frequent_words: words that the answer lists
    n_queries: int = limited(
        64, ROWS
    )  # mqar, multi_needle, variable_tracking: questions of a row, at most a quarter of its tokens


@dataclass
class TextConfig:
    """A text corpus. Documents go to the held-out split by a hash of their content."""

    path: str = limited(
        "", PATH
    )  # .txt, .md, .jsonl, .npy, a directory or pattern of them; empty: the Python standard library's source
    tokenizer: str = limited(
        "bytes", PATH
    )  # bytes | checkpoint (that of init.hf_dir) | none | path of a tokenizer.json (extra `hf`)
    held_out_fraction: float = limited(0.1, Range(1e-9, 1 - 1e-9))
    max_tokens: int = limited(0, Range(0, 2**60))  # 0: no limit
    source: str = limited(
        "memory", Choices(("memory", "grain"))
    )  # memory | grain: .parquet or .array_record files, read as they are needed (extra `data`)
    column: str = limited("text", Text(255))  # where .jsonl and .parquet files hold the text
    open_documents: int = limited(16, ROWS)  # grain: documents that rows are cut from in turn, so that a batch holds several
    held_out_tokens: int = limited(
        2**20, Range(1, 2**60)
    )  # grain: what evaluation draws from; finding them reads 1 / held_out_fraction as many
    control_tokens: bool = False  # whether text that spells a control token, such as <|endoftext|>, becomes it, as in prompts

    def validate(self) -> None:
        if self.source == "grain" and not self.path:
            raise ConfigError(
                "data.text.path is empty; expected .parquet or .array_record files, since data.text.source is 'grain'."
            )
        if self.source == "grain" and self.max_tokens:
            raise ConfigError(
                f"data.text.max_tokens is {self.max_tokens}; expected 0, since data.text.source is 'grain'. Name fewer files."
            )


@dataclass
class DataConfig:
    """The rows of a batch: of the recall task, of other tasks, and of packed text."""

    recall_fraction: float = limited(0.5, FRACTION)  # share of the rows of a batch
    tasks: tuple[tuple[str, float], ...] = ()  # ((task, share of the rows of a batch), ...); what is left is text
    recall: RecallConfig = field(default_factory=RecallConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    text: TextConfig = field(default_factory=TextConfig)

    @property
    def text_fraction(self) -> float:
        """Share of the rows of a batch that recall and the other tasks leave to text; rounding errors are none."""
        left = 1.0 - self.recall_fraction - sum(share for _, share in self.tasks)
        return left if left > 1e-9 else 0.0

    def validate(self) -> None:
        check_kinds(self, "data.")
        for entry in self.tasks:
            if len(entry) != 2:
                raise ConfigError(f"data.tasks has {shown(entry)}; expected (task, share), such as ('multi_needle', 0.25).")
            one_of("data.tasks", entry[0], TASKS)
            fraction(f"data.tasks, the share of {entry[0]},", entry[1])
        names = [name for name, _ in self.tasks]
        if len(set(names)) != len(names):
            raise ConfigError(f"data.tasks names {', '.join(names)}; expected each task once.")
        total = self.recall_fraction + sum(share for _, share in self.tasks)
        if total > 1.0 + 1e-9:
            raise ConfigError(
                f"data.recall_fraction and the shares of data.tasks add up to {total:g}; expected at most 1. Lower one of them."
            )
        self.text.validate()


@dataclass
class OptimizerConfig:
    """One optimizer with its schedule."""

    name: str = limited("adamw", Choices(("adamw", "muon")))  # adamw | muon (matrices by Muon, the rest by AdamW)
    learning_rate: float = limited(3e-3, Range(1e-15, 1e3))
    schedule: str = limited(
        "cosine", Choices(("constant", "linear", "cosine"))
    )  # constant | linear | cosine, after the warm-up
    warmup_steps: int = limited(20, AMOUNT)
    final_fraction: float = limited(0.1, FRACTION)  # of learning_rate, where the schedule ends, one step after the last
    b1: float = limited(0.9, FRACTION)
    b2: float = limited(0.95, FRACTION)
    eps: float = limited(1e-8, Range(1e-30, 1e3))
    weight_decay: float = limited(0.0, Range(0, 1e3))  # on matrices only
    clip_norm: float = limited(1.0, Range(1e-9, 1e9, or_zero=True))  # global gradient norm; 0: no clipping
    indexer_learning_rate: float = limited(
        0.0, Range(1e-15, 1e3, or_zero=True)
    )  # of indexers, which then are clipped and decayed apart; 0: as all other parameters
    indexer_weight_decay: float = limited(0.0, Range(0, 1e3))  # with indexer_learning_rate: on the matrices of indexers

    def validate(self, prefix: str) -> None:
        if self.indexer_weight_decay and not self.indexer_learning_rate:
            raise ConfigError(
                f"{prefix}.indexer_weight_decay is {self.indexer_weight_decay} without {prefix}.indexer_learning_rate; "
                "expected both or neither."
            )
        for name in ("b1", "b2"):
            if getattr(self, name) == 1.0:
                raise ConfigError(f"{prefix}.{name} is 1; expected less, since a mean that decays by 1 never moves.")


@dataclass
class StageConfig:
    """One training stage, as long as `steps` or `tokens` says; with both 0 it is skipped."""

    steps: int = limited(0, AMOUNT)
    tokens: int = limited(
        0, Range(0, 2**60)
    )  # instead of steps: that many tokens, padding included, in whole steps, rounded up; 0: by steps
    batch_size: int = limited(16, ROWS)  # sequences per update
    seq_len: int = limited(256, LENGTH)
    curriculum: tuple[tuple[int, int], ...] = limited((), COUNT)  # ((until_step, seq_len), ...) before seq_len applies
    accumulation: int = limited(
        1, ROWS_IF_SET
    )  # micro-batches per update; 0: as many as leave each device one row, whatever the layout
    indexer_loss_weight: float = limited(1.0, WEIGHT)  # multiplies the KL, summed over layers
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = limited(10, COUNT)
    evaluate_every: int = limited(0, AMOUNT)  # steps between looks at held-out rows, dense and sparse; 0: none
    checkpoint_every: int = limited(500, COUNT)  # the last step of a stage is always saved

    @property
    def n_steps(self) -> int:
        """Steps of the stage: `steps`, or the fewest that see `tokens`."""
        if not self.tokens:
            return self.steps
        first, left = 0, -(-self.tokens // self.batch_size)
        for until, seq_len in self.curriculum:
            if left <= (until - first) * seq_len:
                return first - (-left // seq_len)
            first, left = until, left - (until - first) * seq_len
        return first - (-left // self.seq_len)

    def tokens_after(self, step: int) -> int:
        """Tokens of the first `step` steps, padding included."""
        first = per_row = 0
        for until, seq_len in (*self.curriculum, (step, self.seq_len)):
            last = max(first, min(until, step))
            first, per_row = last, per_row + (last - first) * seq_len
        return self.batch_size * per_row

    def seq_len_at(self, step: int) -> int:
        """Sequence length of the 0-based `step`, in tokens."""
        for until, seq_len in self.curriculum:
            if step < until:
                return seq_len
        return self.seq_len

    @property
    def lengths(self) -> set[int]:
        """The sequence lengths that steps may have, in tokens."""
        return {self.seq_len, *(length for _, length in self.curriculum)}

    @property
    def longest(self) -> int:
        """The longest sequence of any step, in tokens."""
        return max(self.lengths)

    def validate(self, prefix: str) -> None:
        if self.accumulation and self.batch_size % self.accumulation:
            raise ConfigError(
                f"{prefix}.batch_size is {self.batch_size}; expected a multiple of accumulation ({self.accumulation})."
            )
        last = 0
        for phase in self.curriculum:
            if len(phase) != 2 or phase[0] <= last:
                raise ConfigError(
                    f"{prefix}.curriculum is {shown(self.curriculum)}; expected ((until_step, seq_len), ...) with "
                    "rising steps and positive lengths."
                )
            last = phase[0]
        if self.steps and self.tokens:
            raise ConfigError(
                f"{prefix}.steps is {self.steps} and {prefix}.tokens is {self.tokens}; expected one of them. Drop one: "
                f"{prefix}.steps=0 trains by tokens, {prefix}.tokens=0 by steps."
            )
        if self.n_steps > INT32:
            raise ConfigError(
                f"{prefix}.tokens is {self.tokens}, which takes {self.n_steps} steps; expected at most {INT32}. Lower it, or "
                f"raise {prefix}.batch_size or {prefix}.seq_len."
            )
        self.optimizer.validate(f"{prefix}.optimizer")


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


@dataclass
class EvalConfig:
    """The parity table."""

    recall_len: int = limited(256, LENGTH)
    recall_sequences: int = limited(128, AMOUNT)
    text_len: int = limited(128, LENGTH)
    text_sequences: int = limited(256, AMOUNT)
    tasks: tuple[str, ...] = limited((), Choices(TASKS))  # synthetic tasks, a column each; they need not be in data.tasks
    task_len: int = limited(256, LENGTH)
    task_sequences: int = limited(128, COUNT)  # of each task
    loop_sequences: int = limited(16, COUNT)  # held-out rows of a look while training (train.STAGE.evaluate_every, train.gate)
    text_tasks: tuple[str, ...] = limited((), Choices(TEXT_TASKS))  # tasks in plain words among held-out text, a column each
    text_task_lens: tuple[int, ...] = limited((512,), LENGTH)  # tokens of their rows; every task is evaluated at each length
    text_task_sequences: int = limited(32, COUNT)  # rows of each text task at each length
    text_task_scoring: str = limited(
        ARGMAX, Choices((ARGMAX, GENERATION, BOTH))
    )  # argmax of the answer's tokens, each after the right ones; greedy generation that contains the answer; or both
    samples: int = limited(2, AMOUNT)  # held-out rows continued greedily, dense and sparse, for the report; 0: none
    batch_size: int = limited(16, ROWS_IF_SET)  # rows evaluated at a time; 0: one on each device, whatever the layout
    rows: tuple[str, ...] = limited(
        ("dense", "sparse", "untrained", "window", "oracle"), Choices(lambda: tuple(eval_rows()))
    )  # of {eval_rows}
    position_buckets: int = limited(8, ROWS)

    def validate(self) -> None:
        if not self.rows:
            raise ConfigError("eval.rows is empty; expected a row of the parity table at least, such as ('dense', 'sparse').")
        if self.text_tasks and not self.text_task_lens:
            raise ConfigError(
                "eval.text_task_lens is empty, and eval.text_tasks is not; expected a length, such as (512, 2048)."
            )
        for name, chosen in (("task", self.tasks), ("text_task", self.text_tasks), ("row", self.rows)):
            if len(set(chosen)) != len(chosen):
                raise ConfigError(f"eval.{name}s names {shown(', '.join(chosen))}; expected each {name.split('_')[-1]} once.")


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
class ParallelConfig:
    """How many devices each mesh axis has. A preset names a layout; an axis that is not 0 overrides it."""

    preset: str = limited(
        "single", Text(200)
    )  # single, or axes with sizes joined by _: fsdp8, ep8, tp8, ep4_tp2, fsdp2_tp2_cp2, dp2_fsdp4
    data: int = limited(0, Range(0, 2**16))  # dp: batch rows split, parameters replicated
    fsdp: int = limited(0, Range(0, 2**16))  # batch rows and parameters split
    expert: int = limited(0, Range(0, 2**16))  # ep: batch rows and experts split
    tensor: int = limited(0, Range(0, 2**16))  # tp: heads, MLP columns and vocabulary split
    context: int = limited(0, Range(0, 2**16))  # cp: positions split

    def validate(self) -> None:
        self.sizes()

    def sizes(self) -> dict[str, int]:
        """Devices along each axis, in the order of the mesh."""
        return {name: getattr(self, name) or size for name, size in _preset_sizes(self.preset).items()}

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are split into: devices along `BATCH_AXES`."""
        sizes = self.sizes()
        return math.prod(sizes[axis] for axis in BATCH_AXES)


def _preset_sizes(preset: str) -> dict[str, int]:
    sizes = dict.fromkeys(AXES, 1)
    if preset == "single":
        return sizes
    for part in preset.split("_"):
        match = re.fullmatch(r"(dp|fsdp|ep|tp|cp)([1-9][0-9]{0,4})", part)
        name = _AXIS_OF[match[1]] if match else ""
        if not match or sizes[name] != 1:
            raise ConfigError(
                f"parallel.preset is {shown(preset)}; expected 'single', or each of dp, fsdp, ep, tp and cp at most once with "
                "its size, joined by _: such as fsdp8 or ep4_tp2."
            )
        sizes[name] = int(match[2])
    return sizes


@dataclass
class Config:
    """Everything a run needs."""

    name: str = limited("unnamed", Text(200))
    seed: int = limited(0, SEED)
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
