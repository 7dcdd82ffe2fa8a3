"""The parity table: the same weights under dense attention, under the indexer's selection and under the baselines."""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dsa_jax.config import Config, EvalConfig
from dsa_jax.config.selections import BEFORE, DENSE, EvalRow, eval_rows, is_by_indexer, selection
from dsa_jax.data import Batch, EvalData
from dsa_jax.data.tasks import get_task
from dsa_jax.data.text_tasks import TextRows, get_text_task
from dsa_jax.evals.task import Groups, Params, TaskResult, difference, evaluate_task, make_eval_step
from dsa_jax.model import Transformer, init_params
from dsa_jax.parallel.placement import place
from dsa_jax.params import is_indexer_path, merge_parameters, split_parameters

_LOG = logging.getLogger(__name__)
RECALL, TEXT = "recall", "text"
_MEANS = ("accuracy", "loss", "coverage", "keys_per_query")


@dataclass
class Parity:
    """Everything the report shows of an evaluation; `rows` is what report.json holds under that name."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    coverage_by_layer: dict[str, list[float]] = field(default_factory=dict)
    loss_by_position: dict[str, list[float]] = field(default_factory=dict)
    position_ends: list[int] = field(default_factory=list)


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
    `indexer_recall`, in rows that select blocks. A row's `tasks` has an entry for each synthetic and text task of
    `config.eval`, with its accuracy also by depth, hops or rank, and by length. `text_loss_difference`, and `difference` of a
    text task, are means of the row minus `dense` on the same rows and answers with their standard error; they are there in
    the rows after `dense`.

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
    table = Parity(position_ends=_bucket_ends(settings))
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
    dense: dict[str, TaskResult] = {}
    for row, own in jobs:
        step = steps.setdefault(row.attention, make_eval_step(model, row.attention))
        results = {name: evaluate() for name, evaluate in _tasks(step, own, data, settings).items()}
        if row.attention == DENSE and own is params:
            dense = results
        done = list(results.values())
        coverage = _weighted([np.asarray(t.coverage) for t in done], done)
        table.coverage_by_layer[row.title] = coverage.tolist()
        entry = {
            "name": row.title,
            "recall_accuracy": results[RECALL].accuracy if RECALL in results else None,
            "text_loss": results[TEXT].loss if TEXT in results else None,
            "coverage": float(coverage.mean()),
            "keys_per_query": float(_weighted([np.asarray(t.keys_per_query) for t in done], done)),
            "tasks": _summaries(results, dense, settings),
        }
        if TEXT in results:
            table.loss_by_position[row.title] = results[TEXT].loss_by_position
            if dense and results is not dense:
                entry["text_loss_difference"] = difference(results[TEXT].row_losses, dense[TEXT].row_losses)._asdict()
        kept = [t.indexer_recall for t in done if t.indexer_recall is not None]
        if kept:
            entry["indexer_recall"] = float(_weighted([np.asarray(x) for x in kept], done))
        table.rows.append(entry)
        if on_row is not None:
            on_row(entry)
    return table


def _tasks(
    step: Callable[[Params, Batch], dict[str, jax.Array]], params: Params, data: EvalData, settings: EvalConfig
) -> dict[str, Callable[[], TaskResult]]:
    """Everything that a row is evaluated on, by name; a text task by its name and length, "needle@512"."""

    def run(batches: Iterable[Batch | TextRows], groups: Groups | None = None) -> Callable[[], TaskResult]:
        return lambda: evaluate_task(step, params, batches, settings.position_buckets, groups)

    tasks = {}
    if data.has_recall and settings.recall_sequences:
        tasks[RECALL] = run(data.recall_batches(settings.recall_sequences, settings.recall_len, settings.batch_size))
    if data.has_text and settings.text_sequences:
        tasks[TEXT] = run(data.text_batches(settings.text_sequences, settings.text_len, settings.batch_size))
    for name in settings.tasks:
        task = get_task(name)
        groups = Groups(functools.partial(task.groups, data.setting), task.n_groups(data.setting))
        tasks[name] = run(data.task_batches(name, settings.task_sequences, settings.task_len, settings.batch_size), groups)
    for name in settings.text_tasks:
        for length in settings.text_task_lens:
            rows = data.text_task_batches(name, settings.text_task_sequences, length, settings.batch_size)
            tasks[_at(name, length)] = run(rows)
    return tasks


def _at(name: str, length: int) -> str:
    return f"{name}@{length}"


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


def _summaries(
    results: Mapping[str, TaskResult], dense: Mapping[str, TaskResult], settings: EvalConfig
) -> dict[str, dict[str, Any]]:
    """Report entries of the tasks of a row: means over all lengths, and for text tasks each length by itself."""
    entries = {name: _summary(results[name], get_task(name).grouping) for name in settings.tasks}
    for name in settings.text_tasks:
        grouping = get_text_task(name).grouping
        by_length = {}
        for length in settings.text_task_lens:
            result = results[_at(name, length)]
            by_length[str(length)] = _summary(result, grouping)
            if dense and results is not dense:
                by_length[str(length)]["difference"] = difference(result.hits, dense[_at(name, length)].hits)._asdict()
        means = {key: float(np.mean([entry[key] for entry in by_length.values()])) for key in _MEANS}
        entries[name] = means | {"by_length": by_length}
    return entries


def _summary(result: TaskResult, grouping: str) -> dict[str, Any]:
    return {
        "accuracy": result.accuracy,
        "loss": result.loss,
        "coverage": float(np.mean(result.coverage)),
        "keys_per_query": result.keys_per_query,
        f"by_{grouping}": result.accuracy_by_group,
    }


def _weighted(values: Sequence[np.ndarray], tasks: Sequence[TaskResult]) -> np.ndarray:
    return np.asarray(np.average(np.stack(values), axis=0, weights=[t.n_queries for t in tasks]))


def _bucket_ends(settings: EvalConfig) -> list[int]:
    n_buckets = min(settings.position_buckets, settings.text_len)
    return [int(b[-1]) + 1 for b in np.array_split(np.arange(settings.text_len), n_buckets)]
