"""The three training stages of a retrofit: what runs in the forward, which losses act, which parameters learn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dsa_jax.params import is_indexer_path, is_score_bias_path


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
    attention: Literal["dense", "sparse"]
    indexer_loss: Literal["dense", "sparse"] | None
    has_lm_loss: bool
    trains: Callable[[str], bool]


PRETRAIN = Stage("pretrain", "dense", None, True, lambda path: not is_indexer_path(path) and not is_score_bias_path(path))
WARMUP = Stage("warmup", "dense", "dense", False, is_indexer_path)
SPARSE = Stage("sparse", "sparse", "sparse", True, lambda path: not is_score_bias_path(path))

STAGES: dict[str, Stage] = {stage.name: stage for stage in (PRETRAIN, WARMUP, SPARSE)}
