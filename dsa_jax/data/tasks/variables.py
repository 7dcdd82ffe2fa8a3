"""Variable tracking after RULER (arXiv 2404.06654): follow assignments from a variable back to the value it started from.

An assignment is two tokens, the variable and what it is set to: `x0 v`, then `x1 x0`, then `x2 x1`. The chains of a row are
interleaved, each in order. A question is a variable, its answer the value at the start of the variable's chain: one lookup
(two steps, as in an induction head) and one more for every hop. A model that reads nothing scores 1 / n_values, one that says
any of the values it saw at least 1 / n_chains.
"""

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


def variable_tracking_rows(setting: Setting, rng: np.random.Generator, *, n_rows: int, seq_len: int) -> Batch:
    """Rows with `n_chains` chains of `n_hops` + 1 assignments; any variable may be asked for.

    Raises:
        ConfigError: if the row is too short or there are too few keys, which name the variables.
    """
    task, symbols = "variable_tracking", setting.symbols
    n_chains, length = setting.sizes.n_chains, setting.sizes.n_hops + 1
    n = n_chains * length
    require_keys(task, setting, n, f"{n_chains} chains of {length} variables")
    frame = make_frame(task, seq_len, n_questions=n_questions(setting, seq_len), n_needed=2 * n)
    batch = blank_rows(task, setting, rng, n_rows, frame)

    names = symbols.first_key + draw_keys(setting, rng, n_rows, n).reshape(n_rows, n_chains, length)
    values = symbols.first_value + rng.integers(symbols.n_values, size=(n_rows, n_chains))
    sources = np.concatenate([values[:, :, None], names[:, :, :-1]], axis=2)
    places = draw_places(rng, frame, n_rows, n, 2)
    # Which chain each assignment belongs to, in the order of the row, and how far down that chain it is.
    chain = rng.permuted(np.tile(np.repeat(np.arange(n_chains), length), (n_rows, 1)), axis=1)
    so_far = np.cumsum(chain[:, :, None] == np.arange(n_chains), axis=1)
    row = np.arange(n_rows)[:, None]
    link = np.take_along_axis(so_far, chain[:, :, None], axis=2)[:, :, 0] - 1
    batch.input_ids[row, places] = names[row, chain, link]
    batch.input_ids[row, places + 1] = sources[row, chain, link]

    asked = rng.integers(n, size=(n_rows, seq_len - frame.first_question))
    batch.input_ids[:, frame.first_question :] = names[row, asked // length, asked % length]
    batch.targets[:, frame.first_question :] = values[row, asked // length]
    batch.target_mask[:, frame.first_question :] = True
    return batch


def variable_hops(setting: Setting, batch: Batch) -> Int[np.ndarray, "B T"]:
    """At each question how many other variables lie between its variable and the value, 0 to `n_hops`; -1 elsewhere."""
    symbols = setting.symbols
    # A variable stands first where it is set, since its chain is in order.
    set_at = first_places(batch, symbols.first_key, symbols.n_keys)
    rows, positions = np.nonzero(batch.target_mask)
    token = batch.input_ids[rows, positions]
    variable = token - symbols.first_key
    count = np.zeros(rows.shape, np.int64)
    for _ in range(setting.sizes.n_hops + 1):
        is_variable = token < symbols.first_value
        variable = np.where(is_variable, token - symbols.first_key, variable)
        token = np.where(is_variable, batch.input_ids[rows, set_at[rows, variable] + 1], token)
        count += is_variable
    hops = np.full(batch.input_ids.shape, -1)
    hops[rows, positions] = count - 1
    return hops
