"""Variable tracking after RULER (arXiv 2404.06654): follow assignments from a variable back to the value it started from.

An assignment is two tokens, the variable and what it is set to: `x0 v`, then `x1 x0`, then `x2 x1`. The chains of a row are
interleaved, each in order. A question is a variable, its answer the value at the start of the variable's chain: one lookup
(two steps, as in an induction head) and one more for every hop. A model that reads nothing scores 1 / n_values, one that says
any of the values it saw at least 1 / n_chains.
"""

import numpy as np
from jaxtyping import Int

from dsa_jax.data.batch import Batch
from dsa_jax.data.tasks.setting import Draw, Setting, ask, first_places


def variable_tracking_rows(draw: Draw) -> Batch:
    """Rows with `n_chains` chains of `n_hops` + 1 assignments; any variable may be asked for."""
    symbols, sizes, rng = draw.setting.symbols, draw.setting.sizes, draw.rng
    n_rows, n_chains, length = draw.n_rows, sizes.n_chains, sizes.n_hops + 1
    n = n_chains * length
    draw.require_keys(n, f"{n_chains} chains of {length} variables")
    frame = draw.frame(n_questions=draw.n_questions, n_needed=2 * n)
    batch = draw.fillers()

    names = symbols.first_key + draw.subset(symbols.n_keys, n).reshape(n_rows, n_chains, length)
    values = symbols.first_value + rng.integers(symbols.n_values, size=(n_rows, n_chains))
    sources = np.concatenate([values[:, :, None], names[:, :, :-1]], axis=2)
    places = draw.places(frame, n, 2)
    # The chain of each assignment, in the order of the row, and its index in that chain.
    chain = rng.permuted(np.tile(np.repeat(np.arange(n_chains), length), (n_rows, 1)), axis=1)
    so_far = np.cumsum(chain[:, :, None] == np.arange(n_chains), axis=1)
    row = np.arange(n_rows)[:, None]
    link = np.take_along_axis(so_far, chain[:, :, None], axis=2)[:, :, 0] - 1
    batch.input_ids[row, places] = names[row, chain, link]
    batch.input_ids[row, places + 1] = sources[row, chain, link]

    asked = rng.integers(n, size=(n_rows, draw.n_questions))
    return ask(batch, frame, names[row, asked // length, asked % length], values[row, asked // length])


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
