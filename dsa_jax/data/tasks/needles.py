"""Needles in a haystack: find the one place of a long row that holds what a question asks for.

`passkey` hides one needle and asks for it once. `multi_needle` hides several and asks for some of them, over and over; the
others distract. Both follow RULER (arXiv 2404.06654) with a needle shrunk to one token, a record of recall that stands for a
(key, value) pair, so that one hop of attention solves them and a small model can learn them. `mqar` is multi-query
associative recall (Zoology, arXiv 2312.04927): key and value are two tokens, so finding the value takes the two steps of an
induction head. A question is a key, its answer the key's value; a model that reads nothing scores 1 / n_values.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.setting import (
    Setting,
    blank_rows,
    draw_keys,
    draw_places,
    first_places,
    make_frame,
    n_questions,
    require_keys,
)

N_DEPTHS = 4
"""Equal stretches of the row before its first question, by which results are told apart."""


class _Needles(NamedTuple):
    task: str
    n_needles: int
    n_asked: int
    n_questions: int
    width: int  # tokens of a needle: 1 is a record, 2 a key and its value


def passkey_rows(setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    """Rows with one record anywhere in the body and its key as the last token, the only question.

    A row has one value only: a model that answers with the value it saw, whatever the key, is right.

    Raises:
        ConfigError: if the row is too short.
    """
    return _needle_rows(_Needles("passkey", 1, 1, 1, 1), setting, rng, n_rows, seq_len)


def multi_needle_rows(setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    """Rows with `n_needles` records, of which `n_asked` are asked for with replacement, each equally often on average.

    Raises:
        ConfigError: if the row is too short or there are too few keys.
    """
    n = _count(setting, seq_len)
    asked = min(setting.sizes.n_asked, n)
    return _needle_rows(_Needles("multi_needle", n, asked, n_questions(setting, seq_len), 1), setting, rng, n_rows, seq_len)


def mqar_rows(setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    """Rows with `n_needles` pairs of a key and, right after it, its value; every key may be asked for.

    Raises:
        ConfigError: if the row is too short or there are too few keys.
    """
    n = _count(setting, seq_len)
    return _needle_rows(_Needles("mqar", n, n, n_questions(setting, seq_len), 2), setting, rng, n_rows, seq_len)


def record_depths(setting: Setting, batch: Batch) -> Int[np.ndarray, "B T"]:
    """At each question the stretch of the row, 0 to `N_DEPTHS` - 1, in which the record of its key lies; -1 elsewhere."""
    symbols = setting.symbols
    records = first_places(batch, symbols.first_record, symbols.n_keys * symbols.n_values)
    return _depths(setting, batch, records.reshape(-1, symbols.n_keys, symbols.n_values).min(-1))


def pair_depths(setting: Setting, batch: Batch) -> Int[np.ndarray, "B T"]:
    """`record_depths` where a key and its value are two tokens."""
    return _depths(setting, batch, first_places(batch, setting.symbols.first_key, setting.symbols.n_keys))


def _count(setting: Setting, seq_len: int) -> int:
    return max(1, min(setting.sizes.n_needles, seq_len // setting.symbols.tokens_per_record))


def _needle_rows(needles: _Needles, setting: Setting, rng: np.random.Generator, n_rows: int, seq_len: int) -> Batch:
    task, n, width, symbols = needles.task, needles.n_needles, needles.width, setting.symbols
    require_keys(task, setting, n, f"{n} needles")
    frame = make_frame(task, seq_len, n_questions=needles.n_questions, n_needed=n * width)
    batch = blank_rows(task, setting, rng, n_rows, frame)

    keys = draw_keys(setting, rng, n_rows, n)
    values = rng.integers(symbols.n_values, size=(n_rows, n))
    places = draw_places(rng, frame, n_rows, n, width)
    row = np.arange(n_rows)[:, None]
    if width == 1:
        batch.input_ids[row, places] = symbols.first_record + keys * symbols.n_values + values
    else:
        batch.input_ids[row, places] = symbols.first_key + keys
        batch.input_ids[row, places + 1] = symbols.first_value + values

    candidates = rng.permuted(np.tile(np.arange(n), (n_rows, 1)), axis=1)[:, : needles.n_asked]
    asked = candidates[row, rng.integers(needles.n_asked, size=(n_rows, needles.n_questions))]
    batch.input_ids[:, frame.first_question :] = symbols.first_key + keys[row, asked]
    batch.targets[:, frame.first_question :] = symbols.first_value + values[row, asked]
    batch.target_mask[:, frame.first_question :] = True
    return batch


def _depths(setting: Setting, batch: Batch, place_of_key: Int[np.ndarray, "B K"]) -> Int[np.ndarray, "B T"]:
    rows, positions = np.nonzero(batch.target_mask)
    key = batch.input_ids[rows, positions] - setting.symbols.first_key
    first_question = batch.target_mask.argmax(axis=1)
    depths = np.full(batch.input_ids.shape, -1)
    depths[rows, positions] = place_of_key[rows, key] * N_DEPTHS // first_question[rows]
    return depths
