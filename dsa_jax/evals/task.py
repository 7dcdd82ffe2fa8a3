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
from dsa_jax.model.attention.health import SelectionHealth, n_choosing
from dsa_jax.model.attention.visibility import causal_visibility
from dsa_jax.parallel.placement import place_batch, replicate
from dsa_jax.train.loss import forward_with_loss

_HEALTH = "health_"
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
        indexer_recall_by_layer: the same by layer, nan in one without an indexer; empty for other selections.
        health: by the names of `SelectionHealth`, a value per layer: means over the queries that have a choice, nan where there
            are none; `n_not_finite` is a number of queries. Empty for dense attention and modes of a single kind.
        n_targets: positions that counted.
        n_queries: queries that coverage and keys_per_query are means over.
        row_losses: nats per target of each row that has targets, in order.
        row_losses_by_position: the same in the buckets of positions; nan where a bucket of the row has no target.
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
    indexer_recall_by_layer: list[float] = field(default_factory=list)
    health: dict[str, list[float]] = field(default_factory=dict)
    row_losses: list[float] = field(default_factory=list)
    row_losses_by_position: list[list[float]] = field(default_factory=list)
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
            "token_nll": per_token.nll,
            "coverage": output.coverage * queries,
            "keys": output.keys_per_query * queries,
            "queries": queries,
        }
        if output.indexer_recall is not None:
            sums["indexer_recall"] = jnp.nanmean(output.indexer_recall) * queries
            sums["indexer_recall_by_layer"] = output.indexer_recall * queries
        if output.health is not None:
            visible = causal_visibility(jnp.asarray(batch.segment_ids))
            sums["choosing"] = n_choosing(visible, model.config.attention.indexer.topk)
            sums |= {f"{_HEALTH}{name}": value for name, value in _health_sums(output.health, sums["choosing"]).items()}
        return replicate(sums)

    return jax.jit(eval_step)


def _health_sums(health: SelectionHealth, choosing: jax.Array) -> dict[str, jax.Array]:
    """The means times their number of queries, 0 where there are none; numbers as they are."""
    means = health._asdict()
    n_not_finite = means.pop("n_not_finite")
    sums = {name: jnp.where(choosing > 0, mean * choosing, 0.0) for name, mean in means.items()}
    return sums | {"n_not_finite": n_not_finite}


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
    by_position: list[np.ndarray] = []
    for item in batches:
        batch, answers = item if isinstance(item, TextRows) else (item, _each_target(item, groups))
        results = jax.device_get(step(params, place_batch(batch)))
        hits.append(_answers_hit(results.pop("hits"), batch, answers))
        group_of.append(answers.groups)
        row_nll, row_targets = results.pop("row_nll"), batch.target_mask.sum(1)
        row_losses.append(row_nll[row_targets > 0] / row_targets[row_targets > 0])
        by_position.append(_bucket_means(results.pop("token_nll"), batch.target_mask, n_buckets)[row_targets > 0])
        for name, value in results.items():
            total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    buckets = _buckets(len(total["nll"]), n_buckets)
    n_targets, n_queries = total["targets"].sum(), total["queries"]
    all_hits, all_groups = np.concatenate(hits), np.concatenate(group_of)
    n_groups = groups.n if groups else int(all_groups.max(initial=-1)) + 1
    health = {name: total.pop(f"{_HEALTH}{name}") for name in SelectionHealth._fields if f"{_HEALTH}{name}" in total}
    n_of = {name: 1 if name == "n_not_finite" else total["choosing"] for name in health}
    return TaskResult(
        loss=_mean(total["nll"].sum(), n_targets),
        coverage=[_mean(x, n_queries) for x in total["coverage"]],
        keys_per_query=_mean(total["keys"].mean(), n_queries),
        indexer_recall=_mean(total["indexer_recall"], n_queries) if "indexer_recall" in total else None,
        loss_by_position=[_mean(total["nll"][b].sum(), total["targets"][b].sum()) for b in buckets],
        indexer_recall_by_layer=[_mean(x, n_queries) for x in total.get("indexer_recall_by_layer", ())],
        health={name: [_mean(x, n_of[name]) for x in values] for name, values in health.items()},
        n_targets=int(n_targets),
        n_queries=int(n_queries),
        row_losses=np.concatenate(row_losses).tolist(),
        row_losses_by_position=np.concatenate(by_position).tolist(),
        groups=all_groups.tolist(),
        **_accuracies(all_hits, all_groups, n_groups),
    )


def _buckets(length: int, n_buckets: int) -> list[np.ndarray]:
    """Positions 0 to length - 1 in equal stretches."""
    return np.array_split(np.arange(length), min(n_buckets, length))


def _bucket_means(nll: np.ndarray, mask: np.ndarray, n_buckets: int) -> np.ndarray:
    """Nats per target of each row in each bucket of positions; nan where it has no target."""
    starts = [bucket[0] for bucket in _buckets(nll.shape[1], n_buckets)]
    sums = np.add.reduceat(np.where(mask, nll, 0.0).astype(np.float64), starts, axis=1)
    counts = np.add.reduceat(mask.astype(np.int64), starts, axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


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
