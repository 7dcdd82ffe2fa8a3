"""The three training stages of a retrofit: attention of the forward pass, losses, trained parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dsa_jax.config import Config
from dsa_jax.config.selections import DENSE, is_by_indexer
from dsa_jax.model.attention.base import INDEXER, MODEL
from dsa_jax.model.attention.kinds import learns_from
from dsa_jax.params import is_score_bias_path


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        name: as in `TrainConfig`.
        attention: the attention of the forward pass.
        indexer_loss: support of the indexer's KL; None where the indexer does not learn.
        has_lm_loss: whether the language-model head and loss are computed at all.
        trains: whether the parameter at a path is updated by gradient.
    """

    name: str
    attention: str
    indexer_loss: Literal["dense", "sparse"] | None
    has_lm_loss: bool
    trains: Callable[[str], bool]


def language_stage(name: str, attention: str) -> Stage:
    """A stage that learns language under `attention`, and its indexer, if that chooses the keys, from the KL over them."""
    by_indexer = is_by_indexer(attention)
    taught = {MODEL, attention, INDEXER} if by_indexer else {MODEL, attention}
    trains = lambda path: learns_from(path) in taught and not is_score_bias_path(path)
    return Stage(name, attention, "sparse" if by_indexer else None, True, trains)


def indexer_stage(name: str, attention: str) -> Stage:
    """A stage that trains the indexers alone, by their KL over the keys that `attention` reads; the base stays as it is.

    Unless `attention` is dense, no dense attention is computed.
    """
    loss: Literal["dense", "sparse"] = "dense" if attention == DENSE else "sparse"
    return Stage(name, attention, loss, False, lambda path: learns_from(path) == INDEXER)


PRETRAIN = language_stage("pretrain", DENSE)
WARMUP = indexer_stage("warmup", DENSE)
SPARSE = language_stage("sparse", "sparse")
STAGES: dict[str, Stage] = {stage.name: stage for stage in (PRETRAIN, WARMUP, SPARSE)}
"""As a retrofit runs them unless its recipe says otherwise."""


def stage_of(config: Config, name: str) -> Stage:
    """The stage `name` as the recipe trains it."""
    if name == "warmup":
        return indexer_stage(name, config.train.warmup_attention)
    if name == "sparse" and config.train.sparse_trains == "indexer":
        return indexer_stage(name, config.train.sparse_attention)
    return language_stage(name, getattr(config.train, f"{name}_attention"))


def trained_attention(config: Config, last: str) -> str:
    """The attention that a model has learned language under once the stage `last` has run; "": none has.

    The warm-up changes nothing about it, and of a model that came from elsewhere its configuration says it.
    """
    if last == "sparse":
        return config.train.sparse_attention
    return config.train.pretrain_attention if last and config.train.pretrain.n_steps else config.model.attention.mode
