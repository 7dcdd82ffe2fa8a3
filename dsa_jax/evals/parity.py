"""The parity table: the same weights under dense attention, under the indexer's selection and under the baselines."""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from dsa_jax.config import ARGMAX, GENERATION, GENERATION_ROOM, Config, EvalConfig
from dsa_jax.config.selections import BEFORE, DENSE, SPARSE, EvalRow, eval_rows, is_by_indexer, selection
from dsa_jax.costs.comparison import dense_and_sparse
from dsa_jax.data import Batch, EvalData
from dsa_jax.data.tasks import get_task
from dsa_jax.data.text_tasks import TextRows, generated, get_text_task
from dsa_jax.evals.generated import Continue, answers_found, continuing, why_not_generated
from dsa_jax.evals.samples import Sample, make_samples, sample_tokens, wants_samples
from dsa_jax.evals.task import EvalStep, Groups, Params, TaskResult, difference, evaluate_task, make_eval_step
from dsa_jax.generation.rehearse import rehearse_generation
from dsa_jax.model import Transformer, abstract_params, build_model, init_params
from dsa_jax.parallel.mesh import BATCH_AXES
from dsa_jax.parallel.placement import current_mesh, place, with_shardings
from dsa_jax.params import is_indexer_path, merge_parameters, split_parameters
from dsa_jax.rehearsal import abstract_batch, rehearse

_LOG = logging.getLogger(__name__)
RECALL, TEXT = "recall", "text"
_MEANS = ("accuracy", "loss", "coverage", "keys_per_query")


@dataclass
class Parity:
    """Everything the report shows of an evaluation, by the names that report.json has; `setup` is what was evaluated."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    coverage_by_layer: dict[str, list[float]] = field(default_factory=dict)
    loss_by_position: dict[str, list[float]] = field(default_factory=dict)
    loss_difference_by_position: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    position_ends: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    setup: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Any] | None = None
    samples: list[Sample] = field(default_factory=list)


class _Job(NamedTuple):
    """A row to fill in: its title in the table, its attention, and the model with the parameters to run under it."""

    title: str
    attention: str
    model: Transformer
    params: Params


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
    budgets: Sequence[int] = (),
) -> Parity:
    """Fill the parity table.

    Every row runs the same weights but `dense, before sparse training`, which runs `params_before` where given: it tells what
    the extra training itself changed. `sparse, untrained indexer` has freshly initialised indexer weights (seed + 1).
    `coverage` and `keys_per_query` are means over the queries of all evaluated sequences: recall, text and tasks; so is
    `indexer_recall`, in rows that select blocks. A row's `tasks` has an entry for each synthetic and text task of
    `config.eval`, with its accuracy also by depth, hops or rank, and by length. `text_loss_difference`, and `difference` of a
    text task, are means of the row minus `dense` on the same rows and answers with their standard error; they are there in
    the rows after `dense`. Text tasks that are scored by generation have an entry under their `generated` name; where a row
    cannot generate its accuracy is None, and a remark says why.

    Args:
        model: the transformer.
        params: its parameters.
        data: held-out batches.
        config: `eval` says which rows, how many sequences and how long; `seed` seeds the untrained indexer.
        params_before: parameters of the dense model before the sparse stage.
        on_row: called with each finished row.
        steps: by attention, those of `rehearsed_rows`; None: they are made.
        budgets: numbers of keys to select, each with rows of its own, which have it in their names; none: that of the model.
            Rows without a budget, `dense` always among them, come first and once.

    Raises:
        ConfigError: if the data cannot be made as `config.eval` asks.
    """
    settings = config.eval
    data.check(settings)
    table = Parity(
        position_ends=_bucket_ends(settings),
        remarks=remarks_on(config, data, budgets),
        setup=_setup(data, config, budgets),
        costs=None if budgets else dense_and_sparse(config.model, settings.text_len),
    )
    for remark in table.remarks:
        _LOG.warning("%s", remark)
    made: dict[tuple[Transformer, str], EvalStep] = {(model, attention): step for attention, step in (steps or {}).items()}
    dense: dict[str, TaskResult] = {}
    writers: dict[str, Continue] = {}
    sampled = sampled_attentions(config) if wants_samples(data, settings) and not budgets else ()
    for job in _jobs(model, params, config, params_before, budgets):
        key = job.model, job.attention
        step = made[key] = made.get(key) or make_eval_step(*key)
        results = {name: evaluate() for name, evaluate in _tasks(step, job.params, data, settings).items()}
        done = list(results.values())
        writer = functools.partial(continuing, job.model, job.params, data.tokenizer, job.attention)
        if settings.text_tasks and settings.text_task_scoring != ARGMAX and not why_not_generated(config.model, job.attention):
            results |= _generated(writer, results, data, settings)
        if job.attention in sampled and job.params is params:
            writers[job.title] = writer(settings.samples)
        if job.attention == DENSE and job.params is params:
            dense = results
        coverage = _weighted([np.asarray(t.coverage) for t in done], done)
        table.coverage_by_layer[job.title] = coverage.tolist()
        entry = {
            "name": job.title,
            "recall_accuracy": results[RECALL].accuracy if RECALL in results else None,
            "text_loss": results[TEXT].loss if TEXT in results else None,
            "coverage": float(coverage.mean()),
            "keys_per_query": float(_weighted([np.asarray(t.keys_per_query) for t in done], done)),
            "tasks": _summaries(results, dense, settings),
        }
        if TEXT in results:
            table.loss_by_position[job.title] = results[TEXT].loss_by_position
            if dense and results is not dense:
                changes = _differences_by_position(results[TEXT], dense[TEXT])
                table.loss_difference_by_position[job.title] = changes
                entry["text_loss_difference"] = difference(results[TEXT].row_losses, dense[TEXT].row_losses)._asdict()
        kept = [t.indexer_recall for t in done if t.indexer_recall is not None]
        if kept:
            entry["indexer_recall"] = float(_weighted([np.asarray(x) for x in kept], done))
        table.rows.append(entry)
        if on_row is not None:
            on_row(entry)
    if writers:
        table.samples = make_samples(writers, data, settings)
    return table


def _jobs(
    model: Transformer, params: Params, config: Config, params_before: Params | None, budgets: Sequence[int]
) -> Iterator[_Job]:
    """The rows of the table in order, and what each runs."""
    if params_before is not None:
        yield _Job(BEFORE.title, BEFORE.attention, model, params_before)
    rows = []
    for name in dict.fromkeys((DENSE, *config.eval.rows) if budgets else config.eval.rows):
        row = eval_rows()[name]
        if not can_run(row, config):
            _LOG.info("left out the row %s: the model lacks the weights it needs", row.title)
            continue
        own = params
        if row.has_fresh_indexer:
            # Compiled together, so that the other parameters are never computed: one device could not hold them all.
            draw = jax.jit(lambda key: split_parameters(init_params(model, key), is_indexer_path)[0])
            own = with_fresh_indexer(params, place(draw(jax.random.key(config.seed + 1))))
        rows.append((row, own))
    yield from (_Job(row.title, row.attention, model, own) for row, own in rows if not (budgets and _has_budget(row)))
    for budget in budgets:
        changed = copy.deepcopy(config.model)
        changed.attention.indexer.topk = budget
        of_budget = build_model(changed)
        for row, own in rows:
            if _has_budget(row):
                yield _Job(f"{row.title}, topk {budget}", row.attention, of_budget, own)


def _has_budget(row: EvalRow) -> bool:
    """Whether `topk` decides how many keys a row reads; a mode of one attention kind has a budget of its own."""
    return row.attention != DENSE and not selection(row.attention).kind


def sampled_attentions(config: Config) -> tuple[str, ...]:
    """The attentions under which held-out text is continued: dense, and the sparse one that the indexer chooses for."""
    trained = config.train.sparse_attention
    sparse = trained if is_by_indexer(trained) else SPARSE
    chosen = [eval_rows()[name] for name in config.eval.rows if name in (DENSE, sparse)]
    return tuple(row.attention for row in chosen if can_run(row, config) and not why_not_generated(config.model, row.attention))


def _generated(
    writer: Callable[[int], Continue], results: Mapping[str, TaskResult], data: EvalData, settings: EvalConfig
) -> dict[str, TaskResult]:
    """The text tasks of a row scored by generation, by their names in `_tasks` with the column's; losses stay what they are."""
    scored, sizes = {}, _sizes(data, settings)
    for name in settings.text_tasks:
        for length in settings.text_task_lens:
            n_sequences, seq_len = sizes[_at(name, length)]
            n_rows = min(settings.batch_size, n_sequences)
            batches = data.text_task_batches(name, n_sequences, seq_len, n_rows)
            hits = answers_found(writer(n_rows), data.tokenizer, batches)
            scored[_at(generated(name), length)] = results[_at(name, length)].scored_by(hits)
    return scored


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
    for attention, n_rows, prompt_len, n_new in sorted(_generations(rows, data, config)):
        what = f"generation under attention {attention!r} ({n_rows} rows of {prompt_len} tokens)"
        sizes = {"n_rows": n_rows, "prompt_len": prompt_len, "max_new_tokens": n_new}
        rehearse_generation(what, model, params, attention, **sizes)
    return steps


def _generations(rows: Sequence[EvalRow], data: EvalData, config: Config) -> set[tuple[str, int, int, int]]:
    """(attention, rows, tokens of a prompt, new tokens) of what is generated for the table; the sizes are the largest."""
    settings, found = config.eval, set()
    if settings.text_tasks and settings.text_task_scoring != ARGMAX:
        able = {row.attention for row in rows if not why_not_generated(config.model, row.attention)}
        n_rows = min(settings.batch_size, settings.text_task_sequences)
        found |= {(name, n_rows, length, GENERATION_ROOM) for name in able for length in settings.text_task_lens}
    if wants_samples(data, settings):
        n_new = sample_tokens(settings)
        sizes = settings.samples, max(1, settings.text_len - n_new), n_new
        found |= {(name, *sizes) for name in sampled_attentions(config)}
    return found


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


def remarks_on(config: Config, data: EvalData, budgets: Sequence[int] = ()) -> list[str]:
    """What a reader of the table has to know.

    The lengths at which a selection of topk keys leaves none out, and the rows that show no score by generation.
    """
    settings = config.eval
    rows = [row for name in settings.rows if can_run(row := eval_rows()[name], config)]
    lengths = [
        *([("recall_len", settings.recall_len)] if data.has_recall and settings.recall_sequences else []),
        *([("text_len", settings.text_len)] if data.has_text and settings.text_sequences else []),
        *([("task_len", settings.task_len)] if settings.tasks else []),
        *(("text_task_lens", length) for length in settings.text_task_lens if settings.text_tasks),
    ]
    remarks = []
    for topk in budgets or (config.model.attention.indexer.topk,):
        covered = [f"eval.{name} ({length})" for name, length in lengths if length <= topk]
        if covered and any(_has_budget(eval_rows()[name]) for name in settings.rows):
            remarks.append(
                f"model.attention.indexer.topk is {topk}, no less than {' and '.join(covered)}: there every selection reads "
                "all keys, so that sparse equals dense whatever the indexer has learned. Lower topk or evaluate longer "
                "sequences."
            )
    if settings.text_tasks and settings.text_task_scoring != ARGMAX:
        reasons = {row.title: why_not_generated(config.model, row.attention) for row in rows}
        remarks += [
            f"The row {title} shows no score by generation (eval.text_task_scoring is {settings.text_task_scoring}): {reason}"
            for title, reason in reasons.items()
            if reason
        ]
    return remarks


def _setup(data: EvalData, config: Config, budgets: Sequence[int]) -> dict[str, Any]:
    """What the table is of, beside the weights: the text, the budgets, the indexer, rows and tokens of each measure."""
    indexer, text = config.model.attention.indexer, data.text.describe() if data.text is not None else None
    reads_text = config.eval.text_tasks or (data.has_text and config.eval.text_sequences)
    return {
        "text": {"source": text["source"], "tokenizer": text["tokenizer"]} if text and reads_text else None,
        "topk": list(budgets or (indexer.topk,)) if indexer.enabled else None,
        "indexer": {"n_heads": indexer.n_heads, "head_dim": indexer.head_dim} if indexer.enabled else None,
        "sizes": {name: list(size) for name, size in _sizes(data, config.eval).items()},
    }


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
        for column in _columns(name, settings):
            by_length: dict[str, dict[str, Any]] = {}
            for length in settings.text_task_lens:
                result = results.get(_at(column, length))
                entry = by_length[str(length)] = _summary(result, grouping) if result else {"accuracy": None}
                if result and dense and results is not dense:
                    entry["difference"] = difference(result.hits, dense[_at(column, length)].hits)._asdict()
            means: dict[str, Any] = {"accuracy": None}
            if all(entry["accuracy"] is not None for entry in by_length.values()):
                means = {key: float(np.mean([entry[key] for entry in by_length.values()])) for key in _MEANS}
            entries[column] = means | {"by_length": by_length}
    return entries


def _columns(name: str, settings: EvalConfig) -> tuple[str, ...]:
    """The columns of a text task, one for each way in which it is scored."""
    columns = {ARGMAX: (name,), GENERATION: (generated(name),)}
    return columns.get(settings.text_task_scoring) or (name, generated(name))


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
