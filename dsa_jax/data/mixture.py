"""Batches that mix recall and text: training ones as a pure function of (seed, step), evaluation ones fixed.

The vocabulary holds the text tokenizer's ids first and the recall task's after them, whatever the mixture is, so a checkpoint
keeps its meaning when the mixture changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsa_jax.config import ConfigError, DataConfig
from dsa_jax.data.batch import Batch, pad_to, stack_rows
from dsa_jax.data.corpus import Corpus, load_corpus
from dsa_jax.data.packing import TokenStream, epoch_order, pack_rows
from dsa_jax.data.recall import RecallTask, recall_rows
from dsa_jax.data.tokenizer import Tokenizer, load_tokenizer

# First word of the entropy of each random stream, so that no two ever share one.
_TRAIN_RECALL, _TRAIN_TEXT, _EVAL_RECALL = 1, 2, 3


@dataclass(frozen=True)
class TrainData:
    """Training batches, random access. `recall` or `text` is None where the mixture has none of it."""

    seed: int
    vocab_size: int  # the model needs at least this many tokens
    recall_fraction: float
    recall: RecallTask | None
    text: Corpus | None
    tokenizer: Tokenizer

    def batch(self, step: int, *, batch_size: int, seq_len: int) -> Batch:
        """The batch of the 0-based `step`: first `round(recall_fraction * batch_size)` recall rows, then text rows.

        While `batch_size` and `seq_len` stay, the text rows of consecutive steps go through every row of the corpus once per
        epoch, in an order of the epoch's own.

        Raises:
            ConfigError: if recall cannot be made at this length or the corpus is shorter than one row.
            ValueError: for a negative step, or a size that is not positive.
        """
        if step < 0 or batch_size < 1 or seq_len < 1:
            raise ValueError(
                f"batch: step is {step}, batch_size {batch_size}, seq_len {seq_len}; expected step >= 0 and positive sizes."
            )
        n_recall = round(self.recall_fraction * batch_size)
        parts = []
        if self.recall is not None and n_recall:
            rng = np.random.default_rng((_TRAIN_RECALL, self.seed, step))
            parts.append(recall_rows(self.recall, rng, n_rows=n_recall, seq_len=seq_len))
        if self.text is not None and n_recall < batch_size:
            parts.append(self._text_rows(self.text.train, step, batch_size - n_recall, seq_len))
        return stack_rows(parts)

    def describe(self) -> dict[str, Any]:
        """What the batches are made of, for result files."""
        return _describe(self.recall_fraction, self.vocab_size, self.recall, self.text)

    def _text_rows(self, stream: TokenStream, step: int, n_rows: int, seq_len: int) -> Batch:
        _check_length(stream, seq_len, "training")
        available = stream.n_rows(seq_len)
        epochs, places = np.divmod(step * n_rows + np.arange(n_rows), available)
        orders = {epoch: epoch_order((_TRAIN_TEXT, self.seed, epoch), available) for epoch in set(epochs.tolist())}
        numbers = np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places, strict=True)], np.int64)
        return pack_rows(stream, numbers, seq_len)


@dataclass(frozen=True)
class EvalData:
    """Fixed batches that training never draws. `recall` or `text` is None where the mixture has none of it."""

    seed: int
    vocab_size: int
    recall_fraction: float
    recall: RecallTask | None
    text: Corpus | None
    tokenizer: Tokenizer

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
        task = self.recall
        if task is None:
            raise ValueError("recall_batches: the data has no recall (data.recall_fraction is 0). Check has_recall first.")
        task.n_records(seq_len)

        def row(i: int) -> Batch:
            return recall_rows(task, np.random.default_rng((_EVAL_RECALL, self.seed, i)), n_rows=1, seq_len=seq_len)

        return (
            pad_to(stack_rows([row(i) for i in range(start, min(start + batch_size, n_sequences))]), batch_size)
            for start in range(0, n_sequences, batch_size)
        )

    def text_batches(self, n_sequences: int, seq_len: int, batch_size: int) -> Iterator[Batch]:
        """`n_sequences` rows spread evenly over the held-out text, or all of its rows where it has fewer.

        The same rows every time, whatever the seed and `batch_size`. Padding rows fill the last batch.

        Raises:
            ConfigError: at once, if the held-out text is shorter than one row.
            ValueError: at once, if the mixture has no text.
        """
        if self.text is None:
            raise ValueError("text_batches: the data has no text (data.recall_fraction is 1). Check has_text first.")
        stream = self.text.held_out
        _check_length(stream, seq_len, "held-out")
        available = stream.n_rows(seq_len)
        n = min(n_sequences, available)
        numbers = np.arange(n) * available // max(n, 1)
        batches = (numbers[start : start + batch_size] for start in range(0, n, batch_size))
        return (pad_to(pack_rows(stream, rows, seq_len), batch_size) for rows in batches)

    def describe(self) -> dict[str, Any]:
        """What the batches are made of, for result files."""
        return _describe(self.recall_fraction, self.vocab_size, self.recall, self.text)


def make_train_data(config: DataConfig, seed: int, vocab_size: int) -> TrainData:
    """Load what the mixture of `config` needs; a corpus only if it has text.

    Args:
        config: the mixture.
        seed: of the recall rows and of the order of the text rows.
        vocab_size: the model's.

    Raises:
        ConfigError: if the model's vocabulary is too small for the data, and whatever loading the corpus raises.
    """
    return TrainData(seed, *_load(config, vocab_size))


def make_eval_data(config: DataConfig, seed: int, vocab_size: int) -> EvalData:
    """The evaluation counterpart of `make_train_data`, with the same arguments and errors."""
    return EvalData(seed, *_load(config, vocab_size))


def _load(config: DataConfig, vocab_size: int) -> tuple[int, float, RecallTask | None, Corpus | None, Tokenizer]:
    config.validate()
    tokenizer = load_tokenizer(config.text.tokenizer)
    task = RecallTask.from_config(config.recall, tokenizer.vocab_size) if config.recall_fraction > 0.0 else None
    needed = tokenizer.vocab_size + (task.n_tokens if task else 0)
    if vocab_size < needed:
        parts = f"{tokenizer.vocab_size} of tokenizer {tokenizer.name!r}" + (f" and {task.n_tokens} of recall" if task else "")
        raise ConfigError(
            f"model.vocab_size is {vocab_size}, too small for the data; expected at least {needed} ({parts}). "
            f"Set model.vocab_size={needed}."
        )
    text = load_corpus(config.text, tokenizer) if config.recall_fraction < 1.0 else None
    return needed, float(config.recall_fraction), task, text, tokenizer


def _check_length(stream: TokenStream, seq_len: int, side: str) -> None:
    if stream.tokens.size < seq_len:
        raise ConfigError(
            f"the {side} text has {stream.tokens.size} tokens, shorter than one sequence of {seq_len}. Use a shorter sequence, "
            "more text (data.text.path, data.text.max_tokens), or another data.text.held_out_fraction."
        )


def _describe(recall_fraction: float, vocab_size: int, recall: RecallTask | None, text: Corpus | None) -> dict[str, Any]:
    return {
        "recall_fraction": recall_fraction,
        "vocab_size": vocab_size,
        "recall": recall._asdict() if recall else None,
        "text": text.describe() if text else None,
    }
