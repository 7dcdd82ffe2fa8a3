"""The parity table: the same weights under dense attention, under the indexer's selection and under the baselines."""

import functools
import logging
import math
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
from dsa_jax.evals.task import EvalStep, Groups, Params, TaskResult, difference, evaluate_task, make_eval_step
from dsa_jax.model import Transformer, abstract_params, init_params
from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.placement import current_mesh, place, with_shardings
from dsa_jax.params import is_indexer_path, merge_parameters, split_parameters
from dsa_jax.rehearsal import abstract_batch, rehearse

_LOG = logging.getLogger(__name__)
RECALL, TEXT = "recall", "text"
_MEANS = ("accuracy", "loss", "coverage", "keys_per_query")


@dataclass
class Parity:
    """Everything the report shows of an evaluation; `rows` and `remarks` are what report.json holds under these names."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    coverage_by_layer: dict[str, list[float]] = field(default_factory=dict)
    loss_by_position: dict[str, list[float]] = field(default_factory=dict)
    loss_difference_by_position: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    position_ends: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


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
    steps: Mapping[str, EvalStep] | None = None,
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
        steps: by attention, those of `rehearsed_rows`; None: they are made.

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
    if steps is None:
        steps = {attention: make_eval_step(model, attention) for attention in dict.fromkeys(row.attention for row, _ in jobs)}
    dense: dict[str, TaskResult] = {}
    for row, own in jobs:
        results = {name: evaluate() for name, evaluate in _tasks(steps[row.attention], own, data, settings).items()}
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
                changes = _differences_by_position(results[TEXT], dense[TEXT])
                table.loss_difference_by_position[row.title] = changes
                entry["text_loss_difference"] = difference(results[TEXT].row_losses, dense[TEXT].row_losses)._asdict()
        kept = [t.indexer_recall for t in done if t.indexer_recall is not None]
        if kept:
            entry["indexer_recall"] = float(_weighted([np.asarray(x) for x in kept], done))
        table.rows.append(entry)
        if on_row is not None:
            on_row(entry)
    return table


def rehearsed_rows(model: Transformer, data: EvalData, config: Config) -> dict[str, EvalStep]:
    """The steps of the parity table by attention, each traced for every shape that it will see, without computing.

    Raises:
        ConfigError: for the first that cannot be computed.
    """
    settings, params = config.eval, with_shardings(abstract_params(model))
    shapes = {(_n_rows(settings, n), length) for n, length in _sizes(data, settings).values()}
    rows = [row for key in settings.rows if can_run(row := eval_rows()[key], config)]
    if config.train.sparse.n_steps:
        rows.insert(0, BEFORE)
    steps = {attention: make_eval_step(model, attention) for attention in dict.fromkeys(row.attention for row in rows)}
    for row in rows:
        for n_rows, seq_len in sorted(shapes):
            what = f"the row {row.title!r} (eval.batch_size {settings.batch_size}, {n_rows} rows of {seq_len} tokens)"
            rehearse(what, steps[row.attention], params, abstract_batch(n_rows, seq_len))
    return steps


def _sizes(data: EvalData, settings: EvalConfig) -> dict[str, tuple[int, int]]:
    """(sequences, tokens of each) of everything that a row is evaluated on, by name; of a text task "needle@512"."""
    sizes = {}
    if data.has_recall and settings.recall_sequences:
        sizes[RECALL] = (settings.recall_sequences, settings.recall_len)
    if data.text is not None and settings.text_sequences:
        available = data.text.held_out.n_rows(settings.text_len)
        sizes[TEXT] = (min(settings.text_sequences, available), settings.text_len)
    sizes |= {name: (settings.task_sequences, settings.task_len) for name in settings.tasks}
    for name in settings.text_tasks:
        sizes |= {_at(name, length): (settings.text_task_sequences, length) for length in settings.text_task_lens}
    return sizes


def _n_rows(settings: EvalConfig, n_sequences: int) -> int:
    """Rows of a batch: no more than there are sequences, in equal parts for the devices that share it."""
    mesh = current_mesh()
    n_parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh else 1
    return min(settings.batch_size, -(-n_sequences // n_parts) * n_parts)


def _tasks(step: EvalStep, params: Params, data: EvalData, settings: EvalConfig) -> dict[str, Callable[[], TaskResult]]:
    """The evaluation of everything in `_sizes`, by the same names."""
    sizes = {name: (n, length, _n_rows(settings, n)) for name, (n, length) in _sizes(data, settings).items()}

    def run(batches: Iterable[Batch | TextRows], groups: Groups | None = None) -> Callable[[], TaskResult]:
        return lambda: evaluate_task(step, params, batches, settings.position_buckets, groups)

    tasks = {}
    if RECALL in sizes:
        tasks[RECALL] = run(data.recall_batches(*sizes[RECALL]))
    if TEXT in sizes:
        tasks[TEXT] = run(data.text_batches(*sizes[TEXT]))
    for name in settings.tasks:
        task = get_task(name)
        groups = Groups(functools.partial(task.groups, data.setting), task.n_groups(data.setting))
        tasks[name] = run(data.task_batches(name, *sizes[name]), groups)
    for name in settings.text_tasks:
        for key in (_at(name, length) for length in settings.text_task_lens):
            tasks[key] = run(data.text_task_batches(name, *sizes[key]))
    return tasks


def _at(name: str, length: int) -> str:
    return f"{name}@{length}"


def remarks_on(config: Config, data: EvalData) -> list[str]:
    """What a reader of the table has to know: the lengths at which a selection of topk keys leaves none out."""
    settings, topk = config.eval, config.model.attention.indexer.topk
    modes = {eval_rows()[name].attention for name in settings.rows}
    lengths = [
        *([("recall_len", settings.recall_len)] if data.has_recall and settings.recall_sequences else []),
        *([("text_len", settings.text_len)] if data.has_text and settings.text_sequences else []),
        *([("task_len", settings.task_len)] if settings.tasks else []),
        *(("text_task_lens", length) for length in settings.text_task_lens if settings.text_tasks),
    ]
    covered = [f"eval.{name} ({length})" for name, length in lengths if length <= topk]
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


def _differences_by_position(result: TaskResult, dense: TaskResult) -> list[dict[str, float]]:
    """Mean and standard error of the difference in each bucket of positions, over the rows that have targets there."""
    columns = zip(
        zip(*result.row_losses_by_position, strict=True), zip(*dense.row_losses_by_position, strict=True), strict=True
    )
    pairs = [[(a, b) for a, b in zip(ours, theirs, strict=True) if not math.isnan(a)] for ours, theirs in columns]
    return [difference([a for a, _ in each], [b for _, b in each])._asdict() for each in pairs]


def _weighted(values: Sequence[np.ndarray], tasks: Sequence[TaskResult]) -> np.ndarray:
    return np.asarray(np.average(np.stack(values), axis=0, weights=[t.n_queries for t in tasks]))


def _bucket_ends(settings: EvalConfig) -> list[int]:
    n_buckets = min(settings.position_buckets, settings.text_len)
    return [int(b[-1]) + 1 for b in np.array_split(np.arange(settings.text_len), n_buckets)]
