"""One task under one attention: held-out batches through the model, reduced to means that can be compared pairwise."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.data import Batch
from dsa_jax.data.text_tasks import Answers, TextRows
from dsa_jax.model import Transformer
from dsa_jax.parallel.placement import place_batch, replicate
from dsa_jax.train.loss import forward_with_loss

Params = dict[str, Any]
EvalStep = Callable[[Params, Batch], dict[str, jax.Array]]


@dataclass(frozen=True)
class TaskResult:
    """Means over the evaluated positions of one task.

    Attributes:
        loss: nats per target.
        accuracy: share of answers that argmax over the vocabulary hits; of one with several tokens, in all of them. Of
            `scored_by`, the share that those hits say.
        coverage: per layer, the share of dense attention mass that the attended keys hold, over queries and heads.
        keys_per_query: keys attended, mean over queries and layers.
        indexer_recall: share of the indexer's top-k keys that a selection of blocks holds, mean over queries and layers with an
            indexer; None for other selections.
        loss_by_position: nats per target in equal buckets of positions; nan where a bucket has no target.
        accuracy_by_group: share of the answers of each group that argmax hits; nan for an empty group, empty without groups.
        n_targets: positions that counted.
        n_queries: queries that coverage and keys_per_query are means over.
        row_losses: nats per target of each row that has targets, in order.
        hits: whether each answer was hit, in order.
        groups: the group of each answer, in order.
    """

    loss: float
    accuracy: float
    coverage: list[float]
    keys_per_query: float
    indexer_recall: float | None
    loss_by_position: list[float]
    accuracy_by_group: list[float]
    n_targets: int
    n_queries: int
    row_losses: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def scored_by(self, hits: np.ndarray) -> "TaskResult":
        """The same result with other `hits` [A], and the accuracies that they give."""
        return replace(self, **_accuracies(hits, np.asarray(self.groups), len(self.accuracy_by_group)))


class Groups(NamedTuple):
    """How the answers of a task are told apart; of batches whose targets are an answer each."""

    of: Callable[[Batch], np.ndarray]  # [B, T], 0 to n - 1 at each target
    n: int


class Difference(NamedTuple):
    """Mean difference of two results on the same rows or answers, and its standard error; nan from less than two."""

    mean: float
    standard_error: float


def make_eval_step(model: Transformer, attention: str) -> EvalStep:
    """A jitted `(params, batch) -> sums`: nll and targets by position and row, coverage and keys by layer; and hits [B, T]."""

    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        output, per_token = forward_with_loss(model, params, batch, attention=attention, return_coverage=True)
        queries = jnp.sum(jnp.asarray(batch.segment_ids) > 0)
        assert output.coverage is not None
        sums = {
            "nll": per_token.nll.sum(0),
            "hits": per_token.correct,
            "targets": jnp.sum(jnp.asarray(batch.target_mask), axis=0),
            "row_nll": per_token.nll.sum(1),
            "coverage": output.coverage * queries,
            "keys": output.keys_per_query * queries,
            "queries": queries,
        }
        if output.indexer_recall is not None:
            sums["indexer_recall"] = jnp.nanmean(output.indexer_recall) * queries
        return replicate(sums)

    return jax.jit(eval_step)


def evaluate_task(
    step: EvalStep,
    params: Params,
    batches: Iterable[Batch | TextRows],
    n_buckets: int,
    groups: Groups | None = None,
) -> TaskResult:
    """Run `step` over the batches and reduce its sums to means.

    Every target of a `Batch` is an answer of its own, in the group that `groups` says; `TextRows` say it themselves.
    """
    total: dict[str, np.ndarray] = {}
    hits: list[np.ndarray] = []
    group_of: list[np.ndarray] = []
    row_losses: list[np.ndarray] = []
    for item in batches:
        batch, answers = item if isinstance(item, TextRows) else (item, _each_target(item, groups))
        results = jax.device_get(step(params, place_batch(batch)))
        hits.append(_answers_hit(results.pop("hits"), batch, answers))
        group_of.append(answers.groups)
        row_nll, row_targets = results.pop("row_nll"), batch.target_mask.sum(1)
        row_losses.append(row_nll[row_targets > 0] / row_targets[row_targets > 0])
        for name, value in results.items():
            total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    buckets = np.array_split(np.arange(len(total["nll"])), min(n_buckets, len(total["nll"])))
    n_targets, n_queries = total["targets"].sum(), total["queries"]
    all_hits, all_groups = np.concatenate(hits), np.concatenate(group_of)
    n_groups = groups.n if groups else int(all_groups.max(initial=-1)) + 1
    return TaskResult(
        loss=_mean(total["nll"].sum(), n_targets),
        coverage=[_mean(x, n_queries) for x in total["coverage"]],
        keys_per_query=_mean(total["keys"].mean(), n_queries),
        indexer_recall=_mean(total["indexer_recall"], n_queries) if "indexer_recall" in total else None,
        loss_by_position=[_mean(total["nll"][b].sum(), total["targets"][b].sum()) for b in buckets],
        n_targets=int(n_targets),
        n_queries=int(n_queries),
        row_losses=np.concatenate(row_losses).tolist(),
        groups=all_groups.tolist(),
        **_accuracies(all_hits, all_groups, n_groups),
    )


def difference(values: Iterable[float | bool], baseline: Iterable[float | bool]) -> Difference:
    """The mean of `values` minus that of `baseline`, pair by pair.

    Raises:
        ValueError: where there are not equally many.
    """
    pairs = np.asarray(list(zip(values, baseline, strict=True)), np.float64).reshape(-1, 2)
    each = pairs[:, 0] - pairs[:, 1]
    if each.size < 2:
        return Difference(float(each.mean()) if each.size else float("nan"), float("nan"))
    return Difference(float(each.mean()), float(each.std(ddof=1) / np.sqrt(each.size)))


def _mean(sums: Any, counts: Any) -> float:
    return float(sums / counts) if counts else float("nan")


def _accuracies(hits: np.ndarray, groups: np.ndarray, n_groups: int) -> dict[str, Any]:
    by_group = [_mean(hits[groups == g].sum(), (groups == g).sum()) for g in range(n_groups)]
    return {"accuracy": _mean(hits.sum(), hits.size), "accuracy_by_group": by_group, "hits": hits.tolist()}


def _each_target(batch: Batch, groups: Groups | None) -> Answers:
    numbers = np.full(batch.target_mask.shape, -1)
    n = int(batch.target_mask.sum())
    numbers[batch.target_mask] = np.arange(n)
    return Answers(numbers, groups.of(batch)[batch.target_mask] if groups else np.full(n, -1), np.ones(n, bool))


def _answers_hit(hits: np.ndarray, batch: Batch, answers: Answers) -> np.ndarray:
    """Whether argmax hits every token of each answer [A]."""
    number, hit = answers.of_target[batch.target_mask], hits[batch.target_mask] > 0
    missed = np.bincount(number, ~hit, minlength=answers.groups.size)
    return missed == 0
