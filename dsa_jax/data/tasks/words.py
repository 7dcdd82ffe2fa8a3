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

The loss is a mean over targets. A row here has `n_answers` of them, a row of needles up to `n_queries`, so words count little
in a mixture with needles unless they have most of its rows.
"""

import numpy as np
from jaxtyping import Int

from dsa_jax.config import ConfigError
from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.setting import Draw, Frame, Setting, ask

ZIPF_EXPONENT = 2.0
"""The word of rank r occurs in proportion to r to the minus this, as in RULER."""


def common_words_rows(draw: Draw) -> Batch:
    """Rows in which every key occurs: the n = `n_answers` words to list n + 1, n, ..., 2 times as often as each other one."""
    n, n_words = draw.setting.sizes.n_answers, draw.setting.symbols.n_keys
    weights = np.ones(n_words, np.int64)
    weights[:n] = np.arange(n + 1, 1, -1)[:n_words]
    frame = _frame(draw, n_needed=int(weights.sum()))
    return _word_rows(draw, frame, weights * (frame.n_places // int(weights.sum())))


def frequent_words_rows(draw: Draw) -> Batch:
    """Rows in which counts fall with rank like a Zipf law of exponent 2, so that the first word makes up more than half.

    Raises:
        ConfigError: also if the row is too short for the counts of the listed words to differ.
    """
    weights = np.arange(1, draw.setting.symbols.n_keys + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    frame = _frame(draw, n_needed=1)
    counts = np.floor(frame.n_places * weights / weights.sum()).astype(np.int64)
    n = draw.setting.sizes.n_answers
    if np.any(np.diff(counts[: n + 1]) >= 0):
        raise ConfigError(
            f"{draw.task}: a row of {draw.seq_len} tokens has counts {counts[: n + 1].tolist()} for its first words; expected "
            f"each below the one before. Use longer rows, or lower data.task.n_answers ({n})."
        )
    return _word_rows(draw, frame, counts)


def answer_ranks(setting: Setting, batch: Batch) -> Int[np.ndarray, "B T"]:
    """At each target its rank by frequency, 0 to `n_answers` - 1; -1 elsewhere."""
    del setting
    return np.where(batch.target_mask, np.cumsum(batch.target_mask, axis=1) - 1, -1)


def _frame(draw: Draw, *, n_needed: int) -> Frame:
    n = draw.setting.sizes.n_answers
    draw.require_keys(n + 1, f"{n} words to list and at least one other")
    return draw.frame(n_questions=n, n_needed=n_needed)


def _word_rows(draw: Draw, frame: Frame, counts: Int[np.ndarray, " K"]) -> Batch:
    """Rows whose word of rank r occurs `counts[r]` times; fillers take the places left."""
    batch, n = draw.fillers(), draw.setting.sizes.n_answers
    words = draw.setting.symbols.first_key + draw.subset(draw.setting.symbols.n_keys, counts.size)
    # Ranks in a random order per row; the places behind them keep their fillers, and the permutation mixes both.
    body = batch.input_ids[:, 1 : frame.body_end]
    body[:, : int(counts.sum())] = np.repeat(words, counts, axis=1)
    draw.rng.permuted(body, axis=1, out=body)
    questions = np.insert(words[:, : n - 1], 0, draw.setting.question, axis=1)
    return ask(batch, frame, questions, words[:, :n])
