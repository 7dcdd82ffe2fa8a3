"""Aggregation after RULER (arXiv 2404.06654): which words occur most? No single place of the row holds the answer.

The body is words, here the keys of recall, in random order. Behind the question token the row lists the most frequent words,
most frequent first: each is the target of the token before it. Counts differ by rank and follow from the row's length, so the
answer is unique. The best answer that is always the same scores 1 / n_keys.

Why a selection of the top k keys must fail once the words outnumber its budget. Nothing tells one occurrence of a word from
the next: the answer is a sum over all of them, dense attention that solves the task spreads its mass over as many keys as there
are words, and k of n keys of about equal mass hold about k / n of it, whichever they are; a perfect indexer (`oracle top-k`) is
no better. What is left is an estimate from a sample of k words, whose counts err by about the square root of themselves.
`frequent_words` has steep counts (Zipf), so that its first words survive sampling; the counts of `common_words` are close
together, so that they do not. Several layers can add up more than k keys between them, but only by another algorithm than the
one that dense attention has taught them. The failure is the finding: these tasks say what a budget of k cannot do.

The loss is a mean over targets. A row here has `n_answers` of them, a row of needles up to `n_queries`, so words weigh little
in a mixture with needles unless they have most of its rows.
"""

import numpy as np
from jaxtyping import Int

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.setting import Frame, Setting, blank_rows, draw_keys, make_frame, require_keys

ZIPF_EXPONENT = 2.0
"""The word of rank r occurs in proportion to r to the minus this, as in RULER."""


def common_words_rows(setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    """Rows in which every key occurs: the n = `n_answers` words to list n + 1, n, ..., 2 times as often as each other one.

    Raises:
        ConfigError: if the row is too short for these counts, or there is no other word.
    """
    n, n_words = setting.sizes.n_answers, setting.symbols.n_keys
    weights = np.ones(n_words, np.int64)
    weights[:n] = np.arange(n + 1, 1, -1)[:n_words]
    frame = _frame("common_words", setting, seq_len, n_needed=int(weights.sum()))
    return _word_rows("common_words", setting, rng, n_rows, frame, weights * (frame.n_places // int(weights.sum())))


def frequent_words_rows(setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    """Rows in which counts fall with rank like a Zipf law of exponent 2, so that the first word makes up more than half.

    Raises:
        ConfigError: if the row is too short for the counts of the listed words to differ, or there is no other word.
    """
    weights = np.arange(1, setting.symbols.n_keys + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    frame = _frame("frequent_words", setting, seq_len, n_needed=1)
    counts = np.floor(frame.n_places * weights / weights.sum()).astype(np.int64)
    n = setting.sizes.n_answers
    if np.any(np.diff(counts[: n + 1]) >= 0):
        raise ConfigError(
            f"frequent_words: a row of {seq_len} tokens has counts {counts[: n + 1].tolist()} for its first words; expected "
            f"each below the one before. Use longer rows, or lower data.task.n_answers ({n})."
        )
    return _word_rows("frequent_words", setting, rng, n_rows, frame, counts)


def answer_ranks(setting: Setting, batch: Batch) -> Int[np.ndarray, "B T"]:
    """At each target its rank by frequency, 0 to `n_answers` - 1; -1 elsewhere."""
    del setting
    return np.where(batch.target_mask, np.cumsum(batch.target_mask, axis=1) - 1, -1)


def _frame(task: str, setting: Setting, seq_len: int, *, n_needed: int) -> Frame:
    n = setting.sizes.n_answers
    require_keys(task, setting, n + 1, f"{n} words to list and at least one other")
    return make_frame(task, seq_len, n_questions=n, n_needed=n_needed)


def _word_rows(
    task: str, setting: Setting, rng: np.random.Generator, n_rows: int, frame: Frame, counts: Int[np.ndarray, " K"]
) -> Batch:
    """Rows whose word of rank r occurs `counts[r]` times; fillers take the places left."""
    batch = blank_rows(task, setting, rng, n_rows, frame)
    words = setting.symbols.first_key + draw_keys(setting, rng, n_rows, counts.size)
    n_words = int(counts.sum())
    # Ranks in a random order per row; the places behind them keep their fillers, and the last permutation mixes both.
    body = batch.input_ids[:, 1 : frame.body_end]
    body[:, :n_words] = np.repeat(words, counts, axis=1)
    rng.permuted(body, axis=1, out=body)

    n = frame.seq_len - frame.first_question
    batch.input_ids[:, frame.first_question] = setting.question
    batch.input_ids[:, frame.first_question + 1 :] = words[:, : n - 1]
    batch.targets[:, frame.first_question :] = words[:, :n]
    batch.target_mask[:, frame.first_question :] = True
    return batch
