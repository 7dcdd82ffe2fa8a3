"""Batches that mix recall, other tasks and text: training ones as a pure function of (seed, step), evaluation ones fixed.

Text that is streamed (data.text.source=grain) is the exception: its rows come in order, and its position is saved and restored.

The vocabulary holds the text tokenizer's ids first, the recall task's after them and the other tasks' few own ones last,
whatever the mixture is, so a checkpoint keeps its meaning when the mixture changes.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsa_jax.config import TASKS as TASK_NAMES
from dsa_jax.config import TEXT_TASKS as TEXT_TASK_NAMES
from dsa_jax.config import ConfigError, DataConfig, EvalConfig
from dsa_jax.data.batch import Batch, pad_to, stack_rows
from dsa_jax.data.corpus import Corpus, load_corpus
from dsa_jax.data.packing import TokenStream, epoch_order, pack_rows
from dsa_jax.data.streamed import StreamedCorpus, TextReader
from dsa_jax.data.tasks import Setting, get_task
from dsa_jax.data.tasks.recall import RecallTask
from dsa_jax.data.text_tasks import TextRows, get_text_task, make_haystack, stack_text_rows
from dsa_jax.data.tokenizer import Tokenizer, load_tokenizer

_LOG = logging.getLogger(__name__)

# First word of the entropy of each random stream: no two streams share one.
_TRAIN_RECALL, _TRAIN_TEXT, _EVAL_RECALL, _TRAIN_TASK, _EVAL_TASK, _EVAL_TEXT_TASK = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class _Mixture:
    """The kinds of rows of the batches; `text` is None where the mixture has none.

    `tasks` are those of the training mixture beside its recall rows, with their shares.
    """

    seed: int
    vocab_size: int  # the model needs at least this many tokens
    model_vocab_size: int
    recall_fraction: float
    tasks: tuple[tuple[str, float], ...]
    setting: Setting  # of all tasks, whether the mixture has them or not
    tokenizer: Tokenizer
    text: Any

    @property
    def recall(self) -> RecallTask | None:
        """The recall task; None where the mixture has none."""
        return self.setting.symbols if self.recall_fraction else None

    def describe(self) -> dict[str, Any]:
        """The composition of the batches, for result files."""
        return {
            "recall_fraction": self.recall_fraction,
            "tasks": dict(self.tasks),
            "vocab_size": self.vocab_size,
            "recall": self.recall._asdict() if self.recall else None,
            "text": self.text.describe() if self.text else None,
        }


class TrainData(_Mixture):
    """Training batches, random access unless text is streamed."""

    text: Corpus | TextReader | None

    def batch(self, step: int, *, batch_size: int, seq_len: int) -> Batch:
        """The batch of the 0-based `step`: recall rows, rows of each task in the order of the mixture, then text rows.

        Recall has the first `round(recall_fraction * batch_size)` rows; the next task ends at `batch_size` times the sum of
        both shares, rounded, and so on, so that together they never have more rows than their shares add up to.

        While `batch_size` and `seq_len` stay, the text rows of consecutive steps go through every row of the corpus once per
        epoch, in an order of the epoch's own. Streamed text continues at its position, so its steps must follow each other.

        Raises:
            ConfigError: if a task cannot be made at this length, a share of the batch is no row at all, or the corpus is
                shorter than one row.
            ValueError: for a negative step, or a size that is not positive; for a step out of order where text is streamed.
        """
        if step < 0 or batch_size < 1 or seq_len < 1:
            raise ValueError(
                f"batch: step is {step}, batch_size {batch_size}, seq_len {seq_len}; expected step >= 0 and positive sizes."
            )
        shares: list[tuple[str, str, float, tuple[int, ...]]] = []
        if self.recall_fraction:
            shares = [("data.recall_fraction", "recall", self.recall_fraction, (_TRAIN_RECALL, self.seed, step))]
        for name, share in self.tasks:
            shares.append(("data.tasks", name, share, (_TRAIN_TASK, self.seed, step, TASK_NAMES.index(name))))
        parts, n_rows, total = [], 0, 0.0
        for field, name, share, entropy in shares:
            total += share
            n_task = round(total * batch_size) - n_rows
            if share and not n_task:
                raise _no_row(f"{field} gives {name}", share, batch_size)
            rng = np.random.default_rng(entropy)
            parts.append(get_task(name).rows(self.setting, rng, n_rows=n_task, seq_len=seq_len))
            n_rows += n_task
        if self.text is not None:
            if n_rows == batch_size:
                raise _no_row("data.recall_fraction and data.tasks leave text", 1 - total, batch_size)
            read = self.text.rows if isinstance(self.text, TextReader) else self._text_rows
            parts.append(read(step, batch_size - n_rows, seq_len))
        return stack_rows(parts)

    def check(self, *, batch_size: int, seq_len: int) -> None:
        """Check that batches of this size can be made; nothing changes.

        Raises:
            ConfigError: as `batch`.
        """
        data = replace(self, text=self.text.fresh()) if isinstance(self.text, TextReader) else self
        data.batch(0, batch_size=batch_size, seq_len=seq_len)

    def state(self) -> dict[str, Any] | None:
        """JSON values for a checkpoint: the text's digest, and the position in it where it is streamed; None without text."""
        if isinstance(self.text, Corpus):
            return {"sha256": self.text.provenance["sha256"]}
        return self.text.state() if self.text is not None else None

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue at a saved `state`.

        Raises:
            ConfigError: if it was saved with other text, or is None and text is streamed.
        """
        if isinstance(self.text, TextReader):
            if state is None:
                raise ConfigError(
                    "the checkpoint holds no position in the text; expected one, since data.text.source is 'grain'."
                )
            self.text.restore(state)
        elif isinstance(self.text, Corpus):
            if state is None:
                _LOG.warning("the checkpoint does not say what text it was trained on: that it is this one is not checked")
            else:
                self.text.require(state["sha256"])

    def _text_rows(self, step: int, n_rows: int, seq_len: int) -> Batch:
        assert isinstance(self.text, Corpus) and self.text.train
        stream = self.text.train
        _check_length(stream, seq_len, "training")
        available = stream.n_rows(seq_len)
        epochs, places = np.divmod(step * n_rows + np.arange(n_rows), available)
        orders = {epoch: epoch_order((_TRAIN_TEXT, self.seed, epoch), available) for epoch in set(epochs.tolist())}
        numbers = np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places, strict=True)], np.int64)
        return pack_rows(stream, numbers, seq_len)


class EvalData(_Mixture):
    """Fixed batches of held-out rows, which training never draws."""

    text: Corpus | None

    @property
    def has_recall(self) -> bool:
        """Whether `recall_batches` can be called."""
        return self.recall is not None

    @property
    def has_text(self) -> bool:
        """Whether `text_batches` can be called."""
        return self.text is not None

    def recall_batches(self, n_sequences: int, seq_len: int, batch_size: int) -> Iterator[Batch]:
        """`n_sequences` recall rows; row i depends on the seed, i and `seq_len` only. Padding rows fill the last batch.

        Raises:
            ConfigError: at once, if recall cannot be made at this length.
            ValueError: at once, if the mixture has no recall.
        """
        if self.recall is None:
            raise ValueError("recall_batches: the data has no recall (data.recall_fraction is 0). Check has_recall first.")
        return self._batches("recall", lambda i: (_EVAL_RECALL, self.seed, i), n_sequences, seq_len, batch_size)

    def task_batches(self, name: str, n_sequences: int, seq_len: int, batch_size: int) -> Iterator[Batch]:
        """`n_sequences` rows of a synthetic task, whether or not training mixes it in, as `recall_batches` makes them.

        Raises:
            ConfigError: at once, for an unknown task, a length at which it cannot be made, or a model without its tokens.
        """
        get_task(name)
        needed = self.setting.question if name == "recall" else self.setting.end
        if self.model_vocab_size < needed:
            raise ConfigError(
                f"model.vocab_size is {self.model_vocab_size}, too small for the task {name}, whose tokens end at {needed}. "
                f"Only a model trained on them can answer it: train one with model.vocab_size={needed} or more."
            )
        place = TASK_NAMES.index(name)
        return self._batches(name, lambda i: (_EVAL_TASK, self.seed, i, place), n_sequences, seq_len, batch_size)

    def _batches(
        self, name: str, entropy: Callable[[int], tuple[int, ...]], n_sequences: int, seq_len: int, batch_size: int
    ) -> Iterator[Batch]:
        def draw(entropy: int | tuple[int, ...], n_rows: int) -> Batch:
            return get_task(name).rows(self.setting, np.random.default_rng(entropy), n_rows=n_rows, seq_len=seq_len)

        draw(0, 0)  # raises here, not at the first batch
        return (
            pad_to(stack_rows([draw(entropy(i), 1) for i in range(first, min(first + batch_size, n_sequences))]), batch_size)
            for first in range(0, n_sequences, batch_size)
        )

    def text_task_batches(self, name: str, n_sequences: int, seq_len: int, batch_size: int) -> Iterator[TextRows]:
        """`n_sequences` rows of a text task in the held-out text; row i depends on the seed, i and `seq_len` only.

        Padding rows, which have no answer, fill the last batch.

        Raises:
            ConfigError: at once, for an unknown task, a length at which it cannot be made, or data without text.
        """
        task, place = get_text_task(name), TEXT_TASK_NAMES.index(name)
        if self.text is None:
            raise ConfigError(
                f"eval.text_tasks has {name}, which needs text, and recall and data.tasks take all rows. Lower their shares."
            )
        haystack = make_haystack(self.text.held_out, self.tokenizer)

        def draw(i: int) -> TextRows:
            rng = np.random.default_rng((_EVAL_TEXT_TASK, self.seed, i, place, seq_len))
            return task.rows(self.tokenizer, haystack, rng, n_rows=1, seq_len=seq_len)

        draw(0)  # raises here, not at the first batch
        return (
            stack_text_rows([draw(i) for i in range(first, min(first + batch_size, n_sequences))], batch_size)
            for first in range(0, n_sequences, batch_size)
        )

    def text_batches(self, n_sequences: int, seq_len: int, batch_size: int) -> Iterator[Batch]:
        """`n_sequences` rows at even distances in the held-out text, or all of its rows where it has fewer.

        The same rows every time, whatever the seed and `batch_size`. Padding rows fill the last batch.

        Raises:
            ConfigError: at once, if the held-out text is shorter than one row.
            ValueError: at once, if the mixture has no text.
        """
        if self.text is None:
            raise ValueError("text_batches: the data has no text (recall and tasks take all rows). Check has_text first.")
        stream = self.text.held_out
        _check_length(stream, seq_len, "held-out")
        available = stream.n_rows(seq_len)
        n = min(n_sequences, available)
        numbers = np.arange(n) * available // max(n, 1)
        batches = (numbers[start : start + batch_size] for start in range(0, n, batch_size))
        return (pad_to(pack_rows(stream, rows, seq_len), batch_size) for rows in batches)

    def check(self, settings: EvalConfig) -> None:
        """Check that every batch of the parity table can be made.

        Raises:
            ConfigError: naming the length or the vocabulary that stands in its way, or if it asks for none.
        """
        wants_recall = self.has_recall and settings.recall_sequences
        wants_text = self.has_text and settings.text_sequences
        if not (wants_recall or wants_text or settings.tasks or settings.text_tasks):
            raise ConfigError(
                "nothing to evaluate: expected a positive eval.recall_sequences (with data.recall_fraction above 0) or "
                "eval.text_sequences (with text in the data), or a task in eval.tasks or eval.text_tasks."
            )
        if wants_recall:
            self.recall_batches(settings.recall_sequences, settings.recall_len, settings.batch_size)
        if wants_text:
            self.text_batches(settings.text_sequences, settings.text_len, settings.batch_size)
        for name in settings.tasks:
            self.task_batches(name, settings.task_sequences, settings.task_len, settings.batch_size)
        for name in settings.text_tasks:
            for length in settings.text_task_lens:
                self.text_task_batches(name, settings.text_task_sequences, length, settings.batch_size)


def make_data(config: DataConfig, seed: int, vocab_size: int) -> tuple[TrainData, EvalData]:
    """Load both sides of the mixture, which share one corpus; a corpus only if it has text.

    Args:
        config: the mixture.
        seed: of the recall rows and of the order of the text rows.
        vocab_size: the model's.

    Raises:
        ConfigError: if the model's vocabulary is too small for the data, and whatever loading the corpus raises.
    """
    fields = _load(config, seed, vocab_size)
    return _train_side(fields), _eval_side(fields)


def make_train_data(config: DataConfig, seed: int, vocab_size: int) -> TrainData:
    """The training side of `make_data` alone, with the same arguments and errors."""
    return _train_side(_load(config, seed, vocab_size))


def make_eval_data(config: DataConfig, seed: int, vocab_size: int) -> EvalData:
    """The evaluation side of `make_data` alone, with the same arguments and errors."""
    return _eval_side(_load(config, seed, vocab_size))


def _train_side(fields: dict[str, Any]) -> TrainData:
    text = fields["text"]
    return TrainData(**fields | {"text": TextReader(text, fields["seed"]) if isinstance(text, StreamedCorpus) else text})


def _eval_side(fields: dict[str, Any]) -> EvalData:
    text = fields["text"]
    return EvalData(**fields | {"text": text.held_out() if isinstance(text, StreamedCorpus) else text})


def _load(config: DataConfig, seed: int, vocab_size: int) -> dict[str, Any]:
    """The fields of both sides; `text` is a Corpus, a StreamedCorpus or None."""
    config.validate()
    tokenizer = load_tokenizer(config.text.tokenizer, control_tokens=config.text.control_tokens)
    task = RecallTask.from_config(config.recall, tokenizer.vocab_size)
    setting = Setting(task, config.task)
    parts = {f"of tokenizer {tokenizer.name!r}": tokenizer.vocab_size}
    if config.recall_fraction or config.tasks:
        parts["of recall"] = task.n_tokens
    if any(name != "recall" for name, _ in config.tasks):
        parts["of the other tasks"] = setting.end - setting.question
    needed = sum(parts.values())
    if vocab_size < needed:
        listed = " and ".join(f"{n} {what}" for what, n in parts.items())
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, too small for the data; expected at least {needed} ({listed}). "
            f"To train from scratch set model.vocab_size={needed}. The model of init.hf_dir or init.checkpoint keeps its "
            "vocabulary: use its tokenizer, without recall or tasks beyond it (data.recall_fraction=0, data.tasks=())."
        )
    text: Any = None
    if config.text_fraction:
        is_streamed = config.text.source == "grain"
        text = StreamedCorpus(config.text, tokenizer) if is_streamed else load_corpus(config.text, tokenizer)
    return {
        "seed": seed,
        "vocab_size": needed,
        "model_vocab_size": vocab_size,
        "recall_fraction": float(config.recall_fraction),
        "tasks": config.tasks,
        "setting": setting,
        "tokenizer": tokenizer,
        "text": text,
    }


def _no_row(what: str, share: float, batch_size: int) -> ConfigError:
    return ConfigError(
        f"{what} a share of {share:g}, which is no row of a batch of {batch_size}. Raise the share or the batch size, or make "
        "it 0."
    )


def _check_length(stream: TokenStream, seq_len: int, side: str) -> None:
    if stream.tokens.size < seq_len:
        raise ConfigError(
            f"the {side} text has {stream.tokens.size} tokens, shorter than one sequence of {seq_len}. Use a shorter sequence, "
            "more text (data.text.path, data.text.max_tokens; data.text.held_out_tokens where it is streamed), or another "
            "data.text.held_out_fraction."
        )
