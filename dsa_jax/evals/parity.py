"""The parity table: the same weights under dense attention, under the indexer's selection and under the baselines."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import Config, EvalConfig
from dsa_jax.config.selections import BEFORE, DENSE, EvalRow, eval_rows, is_by_indexer, selection
from dsa_jax.data import Batch, EvalData
from dsa_jax.data.tasks import get_task
from dsa_jax.model import Transformer, init_params
from dsa_jax.parallel.placement import place, place_batch, replicate
from dsa_jax.params import is_indexer_path, merge_parameters, split_parameters
from dsa_jax.train.loss import forward_with_loss

_LOG = logging.getLogger(__name__)

Params = dict[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """Means over the evaluated positions of one task.

    Attributes:
        loss: nats per target.
        accuracy: share of targets that argmax over the vocabulary hits.
        coverage: per layer, the share of dense attention mass that the attended keys hold, over queries and heads.
        keys_per_query: keys attended, mean over queries and layers.
        indexer_recall: share of the indexer's top-k keys that a selection of blocks holds, mean over queries and layers with an
            indexer; None for other selections.
        loss_by_position: nats per target in equal buckets of positions; nan where a bucket has no target.
        accuracy_by_group: share of the targets of each group that argmax hits; nan for an empty group, empty without groups.
        n_targets: positions that counted.
        n_queries: queries that coverage and keys_per_query are means over.
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


class Groups(NamedTuple):
    """How the targets of a task are told apart."""

    of: Callable[[Batch], np.ndarray]  # [B, T], 0 to n - 1 at each target
    n: int


@dataclass
class Parity:
    """Everything the report shows of an evaluation; `rows` and `remarks` are what report.json holds under these names."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    coverage_by_layer: dict[str, list[float]] = field(default_factory=dict)
    loss_by_position: dict[str, list[float]] = field(default_factory=dict)
    position_ends: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def make_eval_step(model: Transformer, attention: str) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """A jitted `(params, batch) -> sums`: nll and targets by position, coverage and keys by layer; and the hits [B, T]."""

    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        output, per_token = forward_with_loss(model, params, batch, attention=attention, return_coverage=True)
        queries = jnp.sum(jnp.asarray(batch.segment_ids) > 0)
        assert output.coverage is not None
        sums = {
            "nll": per_token.nll.sum(0),
            "hits": per_token.correct,
            "targets": jnp.sum(jnp.asarray(batch.target_mask), axis=0),
            "coverage": output.coverage * queries,
            "keys": output.keys_per_query * queries,
            "queries": queries,
        }
        if output.indexer_recall is not None:
            sums["indexer_recall"] = jnp.nanmean(output.indexer_recall) * queries
        return replicate(sums)

    return jax.jit(eval_step)


def evaluate_task(
    step: Callable[[Params, Batch], dict[str, jax.Array]],
    params: Params,
    batches: Iterable[Batch],
    n_buckets: int,
    groups: Groups | None = None,
) -> TaskResult:
    """Run `step` over the batches and reduce its sums to means."""
    total: dict[str, np.ndarray] = {}
    hits_and_targets = np.zeros((2, groups.n if groups else 0))
    n_hits = 0.0
    for batch in batches:
        results = jax.device_get(step(params, place_batch(batch)))
        hits = results.pop("hits")[batch.target_mask]
        n_hits += float(hits.sum())
        if groups:
            group = groups.of(batch)[batch.target_mask]
            hits_and_targets += [np.bincount(group, weights, groups.n) for weights in (hits, np.ones(len(group)))]
        for name, value in results.items():
            total[name] = total.get(name, 0) + np.asarray(value, np.float64)
    buckets = np.array_split(np.arange(len(total["nll"])), min(n_buckets, len(total["nll"])))
    mean = lambda sums, counts: float(sums / counts) if counts else float("nan")
    n_targets, n_queries = total["targets"].sum(), total["queries"]
    return TaskResult(
        loss=mean(total["nll"].sum(), n_targets),
        accuracy=mean(n_hits, n_targets),
        coverage=[mean(x, n_queries) for x in total["coverage"]],
        keys_per_query=mean(total["keys"].mean(), n_queries),
        indexer_recall=mean(total["indexer_recall"], n_queries) if "indexer_recall" in total else None,
        loss_by_position=[mean(total["nll"][b].sum(), total["targets"][b].sum()) for b in buckets],
        accuracy_by_group=[mean(hits, targets) for hits, targets in hits_and_targets.T],
        n_targets=int(n_targets),
        n_queries=int(n_queries),
    )


def with_fresh_indexer(params: Params, fresh: Params) -> Params:
    """`params` with every indexer parameter taken from `fresh`."""
    _, kept = split_parameters(params, is_indexer_path)
    indexer, _ = split_parameters(fresh, is_indexer_path)
    return merge_parameters(kept, indexer)


def evaluate_parity(
    model: Transformer,
    params: Params,
    data: EvalData,
    config: Config,
    *,
    params_before: Params | None = None,
    on_row: Callable[[dict[str, Any]], None] | None = None,
) -> Parity:
    """Fill the parity table.

    Every row runs the same weights but `dense, before sparse training`, which runs `params_before` where given: it tells what
    the extra training itself changed. `sparse, untrained indexer` has freshly initialised indexer weights (seed + 1).
    `coverage` and `keys_per_query` are means over the queries of all evaluated sequences: recall, text and tasks; so is
    `indexer_recall`, in rows that select blocks. A row's `tasks` has an entry for each synthetic task of `config.eval`, with
    its accuracy also by depth, hops or rank.

    Args:
        model: the transformer.
        params: its parameters.
        data: held-out batches.
        config: `eval` says which rows, how many sequences and how long; `seed` seeds the untrained indexer.
        params_before: parameters of the dense model before the sparse stage.
        on_row: called with each finished row.

    Raises:
        ConfigError: if the data cannot be made as `config.eval` asks.
    """
    settings = config.eval
    data.check(settings)
    table = Parity(position_ends=_bucket_ends(settings), remarks=remarks_on(config, data))
    for remark in table.remarks:
        _LOG.warning("%s", remark)
    jobs: list[tuple[EvalRow, Params]] = []
    if params_before is not None:
        jobs.append((BEFORE, params_before))
    for key in settings.rows:
        row = eval_rows()[key]
        if not can_run(row, config):
            _LOG.info("left out the row %s: the model lacks the weights it needs", row.title)
            continue
        own = params
        if row.has_fresh_indexer:
            # Compiled together, so that the other parameters are never computed: one device could not hold them all.
            draw = jax.jit(lambda key: split_parameters(init_params(model, key), is_indexer_path)[0])
            own = with_fresh_indexer(params, place(draw(jax.random.key(config.seed + 1))))
        jobs.append((row, own))
    steps: dict[str, Callable[[Params, Batch], dict[str, jax.Array]]] = {}
    for row, own in jobs:
        step = steps.setdefault(row.attention, make_eval_step(model, row.attention))
        recall = text = None
        if data.has_recall and settings.recall_sequences:
            batches = data.recall_batches(settings.recall_sequences, settings.recall_len, settings.batch_size)
            recall = evaluate_task(step, own, batches, settings.position_buckets)
        if data.has_text and settings.text_sequences:
            batches = data.text_batches(settings.text_sequences, settings.text_len, settings.batch_size)
            text = evaluate_task(step, own, batches, settings.position_buckets)
            table.loss_by_position[row.title] = text.loss_by_position
        tasks = {name: _evaluate_synthetic(step, own, data, name, settings) for name in settings.tasks}
        done = [task for task in (recall, text, *tasks.values()) if task is not None]
        coverage = _weighted([np.asarray(t.coverage) for t in done], done)
        table.coverage_by_layer[row.title] = coverage.tolist()
        table.rows.append(
            {
                "name": row.title,
                "recall_accuracy": recall.accuracy if recall else None,
                "text_loss": text.loss if text else None,
                "coverage": float(coverage.mean()),
                "keys_per_query": float(_weighted([np.asarray(t.keys_per_query) for t in done], done)),
                "tasks": {name: _summarise(name, result) for name, result in tasks.items()},
            }
        )
        kept = [t.indexer_recall for t in done if t.indexer_recall is not None]
        if kept:
            table.rows[-1]["indexer_recall"] = float(_weighted([np.asarray(x) for x in kept], done))
        if on_row is not None:
            on_row(table.rows[-1])
    return table


def remarks_on(config: Config, data: EvalData) -> list[str]:
    """What a reader of the table has to know: the lengths at which a selection of topk keys leaves none out."""
    settings, topk = config.eval, config.model.attention.indexer.topk
    modes = {eval_rows()[name].attention for name in settings.rows}
    lengths = {
        "eval.recall_len": settings.recall_len if data.has_recall and settings.recall_sequences else None,
        "eval.text_len": settings.text_len if data.has_text and settings.text_sequences else None,
        "eval.task_len": settings.task_len if settings.tasks else None,
    }
    covered = [f"{name} ({length})" for name, length in lengths.items() if length is not None and length <= topk]
    if not covered or all(mode == DENSE or selection(mode).kind for mode in modes):
        return []
    return [
        f"model.attention.indexer.topk is {topk}, no less than {' and '.join(covered)}: there every selection reads all keys, "
        "so that sparse equals dense whatever the indexer has learned. Lower topk or evaluate longer sequences."
    ]


def can_run(row: EvalRow, config: Config) -> bool:
    """Whether the model has what a row needs.

    Without an indexer, whose topk is the budget of the baselines, only what the model may have been trained under.
    """
    attention = config.model.attention
    if kind := selection(row.attention).kind:
        return attention.following_kinds == {kind}
    if row.attention == DENSE or attention.indexer.enabled:
        return True
    trained = attention.mode, config.train.pretrain_attention, config.train.sparse_attention
    return row.attention in trained and not is_by_indexer(row.attention)


def _evaluate_synthetic(
    step: Callable[[Params, Batch], dict[str, jax.Array]], params: Params, data: EvalData, name: str, settings: EvalConfig
) -> TaskResult:
    task = get_task(name)
    groups = Groups(lambda batch: task.groups(data.setting, batch), task.n_groups(data.setting))
    batches = data.task_batches(name, settings.task_sequences, settings.task_len, settings.batch_size)
    return evaluate_task(step, params, batches, settings.position_buckets, groups)


def _summarise(name: str, result: TaskResult) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "loss": result.loss,
        "coverage": float(np.mean(result.coverage)),
        "keys_per_query": result.keys_per_query,
        f"by_{get_task(name).grouping}": result.accuracy_by_group,
    }


def _weighted(values: Sequence[np.ndarray], tasks: Sequence[TaskResult]) -> np.ndarray:
    return np.asarray(np.average(np.stack(values), axis=0, weights=[t.n_queries for t in tasks]))


def _bucket_ends(settings: EvalConfig) -> list[int]:
    n_buckets = min(settings.position_buckets, settings.text_len)
    return [int(b[-1]) + 1 for b in np.array_split(np.arange(settings.text_len), n_buckets)]
