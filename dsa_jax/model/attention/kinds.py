"""The attention kinds by name, and their parameters by path."""

import functools

from dsa_jax.config import ModelConfig
from dsa_jax.config.attention import add_kind_fields, remove_kind_fields
from dsa_jax.config.selections import add_selection, remove_selection
from dsa_jax.model.attention.base import INDEXER, MODEL, AttentionKind, Parameter
from dsa_jax.model.attention.gqa import GQA_KIND
from dsa_jax.model.attention.indexer import INDEXER_PARAMETERS
from dsa_jax.model.attention.mla import MLA_KIND
from dsa_jax.model.attention.nsa import NSA_KIND
from dsa_jax.params import BLOCK_SCALES

_FOLDER = "/attention/"
_KINDS: dict[str, AttentionKind] = {kind.name: kind for kind in (GQA_KIND, MLA_KIND, NSA_KIND)}


def attention_kind(name: str) -> AttentionKind:
    """The record of a kind."""
    return _KINDS[name]


def kinds_of(config: ModelConfig) -> list[AttentionKind]:
    """Records of the kinds that a model's layers are of, each once, in the order of the layers."""
    return [_KINDS[name] for name in dict.fromkeys(layer.kind for layer in config.layers())]


def register_kind(kind: AttentionKind) -> None:
    """Make a kind known to configs, models, sharding, training, evaluation and export.

    Raises:
        ConfigError: where its name, or that of one of its modes, is taken.
        ValueError: where a parameter of it has the path of another kind's, but is sharded or trained otherwise.
    """
    for row in kind.parameters:
        other = _rows().get(row.path)
        if other is not None and (row.split, row.learns) != (other.split, other.learns):
            raise ValueError(
                f"{row.path} of attention kind {kind.name!r} is split over {row.split} and learns from {row.learns!r}; "
                f"expected {other.split} and {other.learns!r} as in the other kinds. Give it a path of its own."
            )
    add_kind_fields(kind.fields)
    for mode in kind.modes:
        add_selection(mode)
    _KINDS[kind.name] = kind
    _rows.cache_clear()


def unregister_kind(name: str) -> None:
    """Forget a kind that `register_kind` made known."""
    for mode in _KINDS.pop(name).modes:
        remove_selection(mode.name)
    remove_kind_fields(name)
    _rows.cache_clear()


def attention_parameter(path: str) -> Parameter | None:
    """The row of the parameter at a whole path; None outside attention layers.

    Raises:
        ValueError: for a parameter of an attention layer that no kind has a row for.
    """
    _, folder, rest = path.partition(_FOLDER)
    if not folder:
        return None
    if rest.endswith(BLOCK_SCALES):
        rest = rest.removesuffix(BLOCK_SCALES) + "kernel"
    if rest not in _rows():
        raise ValueError(f"no attention kind has a row for {path!r}. Add it to `parameters` of its kind's record.")
    return _rows()[rest]


def learns_from(path: str) -> str:
    """Which loss trains the parameter at `path`: `MODEL`, `INDEXER`, or the one attention mode under which it learns."""
    row = attention_parameter(path)
    return MODEL if row is None else row.learns


def is_optional(path: str) -> bool:
    """Whether a checkpoint may lack the parameter: an indexer's, or one that a single attention mode reads."""
    return learns_from(path) != MODEL


def is_of_own_mode(path: str) -> bool:
    """Whether neither dense attention nor any selection reads the parameter, but an attention mode of its kind alone."""
    return learns_from(path) not in (MODEL, INDEXER)


@functools.cache
def _rows() -> dict[str, Parameter]:
    parameters = (row for kind in _KINDS.values() for row in kind.parameters)
    return {row.path: row for row in (*parameters, *INDEXER_PARAMETERS)}
