"""The values of `attention=` as rows: the config, the evaluation, the report and `--helpfull` read them. No JAX here.

A selection rule is one row here and one function in `dsa_jax/model/attention/selection.py`; `register_rule` there adds both
from outside the package. An attention kind may bring rows of its own, which only its layers answer.
"""

from typing import NamedTuple

from dsa_jax.config.checks import ConfigError, one_of


class Selection(NamedTuple):
    """One value of `attention=`.

    Fields: `name`, as in a config; `title` of its row in the parity table; `meaning`, one line for the report; `by_indexer`:
    the indexer's scores choose the keys, so its KL trains it; `kind`: the attention kind whose layers alone answer it, empty
    for all kinds.
    """

    name: str
    title: str
    meaning: str
    by_indexer: bool = False
    kind: str = ""


class EvalRow(NamedTuple):
    """One row of the parity table: the attention it runs; `has_fresh_indexer`: with a newly initialised indexer."""

    title: str
    meaning: str
    attention: str
    has_fresh_indexer: bool = False


DENSE, SPARSE = "dense", "sparse"
_SELECTIONS: dict[str, Selection] = {
    row.name: row
    for row in (
        Selection(DENSE, "dense", "every query attends to all keys before it; what sparse attention must match"),
        Selection(
            SPARSE, "sparse", "each query attends only to the top-k keys that the trained indexer picked", by_indexer=True
        ),
        Selection(
            "coarse_to_fine",
            "sparse, coarse to fine",
            "the same indexer on the best blocks of keys only, chosen by one pooled index key each",
            by_indexer=True,
        ),
        Selection(
            "window",
            "window of the same budget",
            "the most recent keys, as many as sparse reads; shows what a selection by content is worth",
        ),
        Selection("sink_window", "sink and window of the same budget", "the first four keys and the most recent ones"),
        Selection(
            "random",
            "random keys of the same budget",
            "one key from each of as many equal stretches; what the budget is worth without a choice",
        ),
        Selection(
            "blocks",
            "blocks of the same budget",
            "whole blocks by their mean index key, the query's own block always",
            by_indexer=True,
        ),
        Selection("oracle", "oracle top-k", "the top-k keys by true attention mass; the best any indexer could do"),
        Selection(
            "nsa",
            "native sparse attention",
            "compressed blocks, selected blocks and a window, gated; keys read are those of all three",
            kind="nsa",
        ),
    )
}
UNTRAINED = EvalRow(
    "sparse, untrained indexer",
    "the same model with a freshly initialised indexer; shows what training the indexer is worth",
    SPARSE,
    has_fresh_indexer=True,
)
BEFORE = EvalRow(
    "dense, before sparse training",
    "the dense model as it was before the sparse stage; tells what the extra training changed",
    DENSE,
)


def selections() -> tuple[str, ...]:
    """Every value of `attention=`."""
    return tuple(_SELECTIONS)


def common_selections() -> tuple[str, ...]:
    """Values of `attention=` that every attention kind answers."""
    return tuple(row.name for row in _SELECTIONS.values() if not row.kind)


def selection(name: str) -> Selection:
    """The row of a value of `attention=` that is known to be one."""
    return _SELECTIONS[name]


def is_by_indexer(name: str) -> bool:
    """Whether the indexer's scores choose the keys under this attention."""
    return _SELECTIONS[name].by_indexer


def add_selection(row: Selection) -> None:
    """Make a row known to configs, evaluation and report.

    Raises:
        ConfigError: where its name or title is taken or empty, or it has no meaning to show.
    """
    for field, value, taken in (
        ("name", row.name, {*_SELECTIONS, "untrained"}),
        ("title", row.title, {each.title for each in eval_rows().values()} | {BEFORE.title}),
        ("meaning", row.meaning, set()),
    ):
        if not value or value in taken:
            raise ConfigError(f"the {field} of selection {row.name!r} is {value!r}; expected one that is not empty or taken.")
    _SELECTIONS[row.name] = row


def remove_selection(name: str) -> None:
    """Forget a row that `add_selection` made known."""
    del _SELECTIONS[name]


def eval_rows() -> dict[str, EvalRow]:
    """Rows of the parity table by their name in `eval.rows`."""
    rows = {row.name: EvalRow(row.title, row.meaning, row.name) for row in _SELECTIONS.values()}
    return rows | {"untrained": UNTRAINED}


def row_meaning(title: str) -> str:
    """The report's explanation of the row with this title.

    Raises:
        KeyError: for a title that no row has.
    """
    for row in (*eval_rows().values(), BEFORE):
        if row.title == title:
            return row.meaning
    raise KeyError(f"no selection explains the row {title!r}. Give it a row in dsa_jax/config/selections.py.")


def check_selection(field: str, value: str) -> None:
    """Require a known value of `attention=`; the error names `field` and the nearest value."""
    one_of(field, value, selections())
