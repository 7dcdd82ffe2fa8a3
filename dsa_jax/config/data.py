"""The data of a recipe: text, synthetic tasks and how they are mixed."""

from dataclasses import dataclass, field

from dsa_jax.config.checks import ConfigError, fraction, one_of, shown
from dsa_jax.config.fields import check_kinds
from dsa_jax.config.limits import (
    FRACTION,
    PATH,
    ROWS,
    Choices,
    Range,
    Text,
    limited,
)

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


@dataclass
class RecallConfig:
    """Record-token recall: the vocabulary of the task and how densely records are scattered."""

    n_keys: int = limited(32, ROWS)  # distinct key tokens
    n_values: int = limited(8, ROWS)  # distinct value tokens
    n_fillers: int = limited(64, ROWS)  # distinct tokens between the records
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
    held_out_fraction: float = limited(0.1, Range(1e-9, 1 - 1e-9))  # of the documents, for evaluation only
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
