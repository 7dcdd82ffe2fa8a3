"""A short look at held-out rows while training goes on: dense and sparse loss on the same rows, coverage by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dsa_jax.config import Config
from dsa_jax.config.selections import DENSE, is_by_indexer
from dsa_jax.data import Batch, EvalData
from dsa_jax.evals.task import Difference, EvalStep, Params, difference, evaluate_task, make_eval_step
from dsa_jax.model import Transformer


@dataclass(frozen=True)
class HeldOutResult:
    """Losses in nats per target, the difference of sparse and dense, and by layer how the sparse selection is.

    `coverage` is the share of attention that the keys of each layer hold; `by_layer` has the other measurements of the same
    forward pass by name: those of `SelectionHealth` and, where blocks are chosen, `indexer_recall`.
    """

    dense_loss: float
    sparse_loss: float
    difference: Difference
    coverage: tuple[float, ...]
    by_layer: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """The numbers by the names under which they are logged."""
        values = {"dense_loss": self.dense_loss, "sparse_loss": self.sparse_loss, "difference": self.difference.mean}
        values["standard_error"] = self.difference.standard_error
        measured = {"coverage": self.coverage, **self.by_layer}
        return values | {f"{name}_layer_{i}": value for name, layers in measured.items() for i, value in enumerate(layers)}


class HeldOut:
    """Evaluates `eval.loop_sequences` held-out rows: of text where the data has it, else of recall.

    Sparse is the attention of the sparse stage where the indexer chooses its keys, else `sparse`.
    """

    def __init__(self, model: Transformer, data: EvalData, config: Config, steps: Mapping[str, EvalStep]) -> None:
        """`steps` are those of the parity table by attention; what is not among them is made."""
        self._data, self._settings = data, config.eval
        trained = config.train.sparse_attention
        self._sparse = trained if is_by_indexer(trained) else "sparse"
        self._steps = {name: steps.get(name) or make_eval_step(model, name) for name in (DENSE, self._sparse)}

    def __call__(self, params: Params) -> HeldOutResult:
        """Evaluate `params`."""
        dense, sparse = (evaluate_task(self._steps[name], params, self._batches(), 1) for name in (DENSE, self._sparse))
        by_layer = sparse.health | ({"indexer_recall": recall} if (recall := sparse.indexer_recall_by_layer) else {})
        change = difference(sparse.row_losses, dense.row_losses)
        return HeldOutResult(dense.loss, sparse.loss, change, tuple(sparse.coverage), by_layer)

    def _batches(self) -> Iterator[Batch]:
        settings = self._settings
        if self._data.has_text:
            return self._data.text_batches(settings.loop_sequences, settings.text_len, settings.batch_size)
        return self._data.recall_batches(settings.loop_sequences, settings.recall_len, settings.batch_size)


def low_layers(coverage: tuple[float, ...], least: float) -> list[int]:
    """Layers whose coverage is below `least`, the lowest first."""
    order = np.argsort(coverage, kind="stable")
    return [int(layer) for layer in order if coverage[layer] < least]
