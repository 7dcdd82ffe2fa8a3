"""Needles in a haystack: find the one place of a long row that holds the answer to a question.

`passkey` hides one needle and asks for it once. `multi_needle` hides several and asks for some of them, over and over; the
others distract. Both follow RULER (arXiv 2404.06654) with a needle shrunk to one token, a record of recall that stands for a
(key, value) pair, so that one hop of attention solves them and a small model can learn them. `mqar` is multi-query
associative recall (Zoology, arXiv 2312.04927): key and value are two tokens, so finding the value takes the two steps of an
induction head. A question is a key, its answer the key's value; a model that reads nothing scores 1 / n_values.
"""

import numpy as np
from jaxtyping import Int

from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.setting import Draw, Setting, ask, first_places

N_DEPTHS = 4
"""Number of equal stretches of the row before its first question, by which results are grouped."""


def passkey_rows(draw: Draw) -> Batch:
    """Rows with one record anywhere in the body and its key as the last token, the only question.

    A row has one value only: a model that answers with the value it saw, whatever the key, is right.
    """
    return _needle_rows(draw, n_needles=1, n_asked=1, n_questions=1, width=1)


def multi_needle_rows(draw: Draw) -> Batch:
    """Rows with `n_needles` records, of which `n_asked` are asked for with replacement, each equally often on average."""
    n = _n_needles(draw)
    n_asked = min(draw.setting.sizes.n_asked, n)
    return _needle_rows(draw, n_needles=n, n_asked=n_asked, n_questions=draw.n_questions, width=1)


def mqar_rows(draw: Draw) -> Batch:
    """Rows with `n_needles` pairs of a key and, right after it, its value; every key may be asked for."""
    n = _n_needles(draw)
    return _needle_rows(draw, n_needles=n, n_asked=n, n_questions=draw.n_questions, width=2)


def record_depths(setting: Setting, batch: Batch) -> Int[np.ndarray, "B T"]:
    """At each question the stretch of the row, 0 to `N_DEPTHS` - 1, in which the record of its key lies; -1 elsewhere."""
    symbols = setting.symbols
    records = first_places(batch, symbols.first_record, symbols.n_keys * symbols.n_values)
    return _depths(setting, batch, records.reshape(-1, symbols.n_keys, symbols.n_values).min(-1))


def pair_depths(setting: Setting, batch: Batch) -> Int[np.ndarray, "B T"]:
    """`record_depths` where a key and its value are two tokens."""
    return _depths(setting, batch, first_places(batch, setting.symbols.first_key, setting.symbols.n_keys))


def _n_needles(draw: Draw) -> int:
    return max(1, min(draw.setting.sizes.n_needles, draw.seq_len // draw.setting.symbols.tokens_per_record))


def _needle_rows(draw: Draw, *, n_needles: int, n_asked: int, n_questions: int, width: int) -> Batch:
    """Rows with needles of `width` tokens: 1 is a record, 2 a key and its value."""
    symbols = draw.setting.symbols
    draw.require_keys(n_needles, f"{n_needles} needles")
    frame = draw.frame(n_questions=n_questions, n_needed=n_needles * width)
    batch = draw.fillers()

    keys = draw.subset(symbols.n_keys, n_needles)
    values = draw.rng.integers(symbols.n_values, size=keys.shape)
    places = draw.places(frame, n_needles, width)
    row = np.arange(draw.n_rows)[:, None]
    if width == 1:
        batch.input_ids[row, places] = symbols.first_record + keys * symbols.n_values + values
    else:
        batch.input_ids[row, places] = symbols.first_key + keys
        batch.input_ids[row, places + 1] = symbols.first_value + values

    candidates = draw.subset(n_needles, n_asked)
    asked = candidates[row, draw.rng.integers(n_asked, size=(draw.n_rows, n_questions))]
    return ask(batch, frame, symbols.first_key + keys[row, asked], symbols.first_value + values[row, asked])


def _depths(setting: Setting, batch: Batch, place_of_key: Int[np.ndarray, "B K"]) -> Int[np.ndarray, "B T"]:
    rows, positions = np.nonzero(batch.target_mask)
    key = batch.input_ids[rows, positions] - setting.symbols.first_key
    first_question = batch.target_mask.argmax(axis=1)
    depths = np.full(batch.input_ids.shape, -1)
    depths[rows, positions] = place_of_key[rows, key] * N_DEPTHS // first_question[rows]
    return depths
