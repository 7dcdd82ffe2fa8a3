"""report.html: one self-contained page, tables always, plots where matplotlib is installed."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dsa_jax.config import STAGES
from dsa_jax.config.fields import flatten
from dsa_jax.config.selections import row_meaning
from dsa_jax.data.tasks import SYNTHETIC_TASKS
from dsa_jax.data.text_tasks import TEXT_TASKS, generated
from dsa_jax.extras import is_installed
from dsa_jax.report import plots
from dsa_jax.report.looks import held_out_section, position_of
from dsa_jax.report.parts import figure, format_cell, table
from dsa_jax.report.verdict import about, verdict

COLUMNS = (
    ("name", "row"),
    ("recall_accuracy", "recall accuracy"),
    ("text_loss", "text loss"),
    ("coverage", "coverage"),
    ("keys_per_query", "keys/query"),
)
_INDEXER_RECALL = ("indexer_recall", "index recall")
_N_QUALITY = 3  # columns before those of the tasks
_COLUMN_MEANINGS = (
    ("recall accuracy", "share of held-out queries answered with the right value; higher is better"),
    ("text loss", "cross-entropy on held-out text, nats per token; lower is better"),
    ("coverage", "share of the dense attention mass that lies on the keys read"),
    ("keys/query", "keys read per query, mean over queries and layers"),
    ("index recall", "share of the indexer's top-k keys that a selection by blocks holds"),
)
_SUMMARIES = {name: task.summary for name, task in (SYNTHETIC_TASKS | TEXT_TASKS).items()}
_SUMMARIES |= {generated(name): f"{task.summary}: in generated text" for name, task in TEXT_TASKS.items()}
_INSTALL_HINT = "Plots need matplotlib. Install it with: pip install 'dsa-jax[plot]'"
_CSS = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5c6570; --line: #d9dde3; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #9aa4b1; --line: #363c45; --page: #15181c; --card: #1d2127; }
}
body { margin: 0 auto; max-width: 56rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; max-width: 44rem; }
.soft, caption, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: .9rem; padding-bottom: .3rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
td:last-child { white-space: normal; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { width: 1%; padding-right: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--soft); }
.samples { margin: 1rem 0; }
.samples dd { min-width: 0; }
.samples pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: .6rem 0 0; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure svg { display: block; width: auto; height: auto; max-width: 100%; }
figcaption { font-size: .9rem; margin-top: .4rem; }
details { margin: .5rem 0; font-size: .92rem; }
summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
  font: 13px/1.45 ui-monospace, monospace; }
.hint { background: var(--card); border-left: 3px solid #d9730d; padding: .5rem .9rem; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def render_page(
    report: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The HTML of a report of plain JSON values (see `write_report`).

    Args:
        report: the report.
        entries: those of metrics.jsonl.
        evaluations: those of evaluations.jsonl.
    """
    has_plots = is_installed("matplotlib")
    rows = report["rows"]
    sections = [
        _verdict(report),
        _parity(rows, report.get("remarks") or [], has_plots),
        _by_length(rows, has_plots),
        _samples(report.get("samples") or []),
        _costs(report.get("costs")),
        _by_group(rows),
        _by_place(report, "coverage_by_layer", has_plots),
        _by_place(report, "loss_by_position", has_plots),
        held_out_section(evaluations, has_plots),
        _curves(entries) if has_plots else "",
        _stages(report.get("stages") or {}),
        _facts("What text was it?", report.get("corpus")),
        _facts("Where did it run?", report.get("environment")),
        _config(report.get("config")),
    ]
    name = str(report["name"])
    title = f"{name}: dense and sparse attention compared"
    return _page(title, f"{name}: what does sparse attention cost in quality?", has_plots, sections)


def render_progress(
    content: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    """The HTML of a run that is still training: what there is of `render_page` before the parity table."""
    has_plots = is_installed("matplotlib")
    where = position_of(content.get("config") or {}, [*entries, *evaluations])
    told = f"<p>{escape(where.in_stage)}. Reload for more; the parity table comes last.</p>"
    sections = [
        told,
        held_out_section(evaluations, has_plots),
        _curves(entries) if has_plots else "",
        _config(content.get("config")),
    ]
    name = str(content["name"])
    return _page(f"{name}: training, {where.in_all}", f"{name}: still training, {where.in_all}", has_plots, sections)


def _page(title: str, heading: str, has_plots: bool, sections: Sequence[str]) -> str:
    hint = "" if has_plots else f'<p class="hint">{escape(_INSTALL_HINT)}, then run the same command again.</p>'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<h1>{escape(heading)}</h1>\n"
        + "\n".join(section for section in (*sections[:1], hint, *sections[1:]) if section)
        + "\n</body>\n</html>\n"
    )


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(key, title) of each column of the parity table: quality, one per evaluated task, keys read.

    A measure of quality that no row has, such as recall where only text was evaluated, gets no column.
    """
    quality = [
        (key, title) for key, title in COLUMNS[:_N_QUALITY] if key == "name" or any(row.get(key) is not None for row in rows)
    ]
    tasks = dict.fromkeys(name for row in rows for name in row.get("tasks") or {})
    recall = [_INDEXER_RECALL] if any(row.get("indexer_recall") is not None for row in rows) else []
    return [*quality, *((name, name) for name in tasks), *COLUMNS[_N_QUALITY:], *recall]


def with_tasks(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the report by the keys of `columns_of`: the accuracy of each task under the task's name."""
    return {**row, **{name: result["accuracy"] for name, result in (row.get("tasks") or {}).items()}}


def _verdict(report: Mapping[str, Any]) -> str:
    """What the report says first: what it is of, then the sentences of the verdict, doubts set apart."""
    quality, savings, doubts = verdict(report)
    setup = about(report)
    first = f'<p class="soft">{escape(setup)}</p>\n' if setup else ""
    first += "".join(f"<p>{escape(sentence)}</p>\n" for sentence in (quality, savings) if sentence)
    return first + "".join(f'<p class="hint">Doubtful: {escape(doubt)}</p>\n' for doubt in doubts)


def _costs(costs: Mapping[str, Any] | None) -> str:
    """FLOPs and cache bytes of a token by length."""
    if not costs:
        return ""
    by_length = zip(costs["lengths"], costs["dense_flops"], costs["sparse_flops"], strict=True)
    cells = [[f"{length:,}", f"{d / 1e9:.3f}", f"{s / 1e9:.3f}", f"{s / d - 1:+.0%}"] for length, d, s in by_length]
    header = ["tokens in the sequence", "dense, GFLOP per token", "sparse, GFLOP per token", "change"]
    caption = "Forward pass of one token, on average over the sequence, by formula"
    cache = (
        f"A token takes {costs['dense_cache_bytes'] / 1024:.1f} KiB of KV cache in bfloat16, with its index keys "
        f"{costs['sparse_cache_bytes'] / 1024:.1f} KiB."
    )
    return f"<h2>What does a token cost?</h2>\n{table(caption, header, cells)}<p>{cache}</p>"


def _by_length(rows: Sequence[Mapping[str, Any]], has_plots: bool) -> str:
    """The accuracy of each text task by length, and what it loses to dense, one plot and one table each."""
    tables = []
    for name in (column for task in TEXT_TASKS for column in (task, generated(task))):
        results = {row["name"]: row["tasks"][name]["by_length"] for row in rows if name in (row.get("tasks") or {})}
        if results:
            lengths = list(next(iter(results.values())))
            cells = [[row, *(_against_dense(entries[length]) for length in lengths)] for row, entries in results.items()]
            header = ["row", *(f"{length} tokens" for length in lengths)]
            if has_plots:
                tables.append(_differences_figure(name, lengths, results))
            tables.append(table(f"{name}: share of {_SUMMARIES[name]}", header, cells))
    note = "In brackets the difference to dense and its standard error."
    return f"<h2>What is found in longer texts?</h2>\n<p>{note}</p>{''.join(tables)}" if tables else ""


def _differences_figure(name: str, lengths: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> str:
    """The difference of each row to dense by length, where any has one."""
    differences = {
        row: [_mean_and_error(entries[length].get("difference")) for length in lengths] for row, entries in results.items()
    }
    y_label = "minus dense (share of answers)"
    svg = plots.differences_by_row(
        lengths, differences, list(results), name=f"difference-{name}", x_label="length (tokens)", y_label=y_label
    )
    return figure(
        svg, f"Difference to dense on {name} by length", "Bars are standard errors over the same answers; 0 is dense."
    )


def _mean_and_error(difference: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    difference = difference or {}
    return difference.get("mean"), difference.get("standard_error")


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Held-out text with what the model writes instead of its continuation, a list each."""
    if not samples:
        return ""
    lists = []
    for sample in samples:
        shown = {"prompt, its end": sample["prompt"], "the text itself": sample["text"], **sample["continuations"]}
        items = "".join(f"<dt>{escape(name)}</dt><dd><pre>{escape(text)}</pre></dd>" for name, text in shown.items())
        lists.append(f'<dl class="samples">{items}</dl>')
    note = "Held-out text, continued greedily by the same weights. One different token changes all that follow it."
    return f"<h2>How does it write?</h2>\n<p>{note}</p>{''.join(lists)}"


def _against_dense(entry: Mapping[str, Any]) -> str:
    mean, error = _mean_and_error(entry.get("difference"))
    if mean is None:
        return format_cell("accuracy", entry["accuracy"])
    return f"{format_cell('accuracy', entry['accuracy'])} ({mean:+.3f}{'' if error is None else f' ± {error:.3f}'})"


def _parity(rows: Sequence[Mapping[str, Any]], remarks: Sequence[str], has_plots: bool) -> str:
    columns, rows = columns_of(rows), [with_tasks(row) for row in rows]
    cells = [[row["name"], *(format_cell(column, row.get(column)) for column, _ in columns[1:])] for row in rows]
    numbers = table("Parity table, on held-out data", [title for _, title in columns], cells)
    tasks = [name for name, _ in columns if name in _SUMMARIES]
    titles = {title for _, title in columns}
    column_meanings = [(title, meaning) for title, meaning in _COLUMN_MEANINGS if title in titles]
    column_meanings += [(name, f"share of {_SUMMARIES[name]}") for name in tasks]
    meanings = [(row["name"], row_meaning(row["name"])) for row in rows]
    notes = "".join(f'<p class="hint">{escape(remark)}</p>\n' for remark in remarks)
    figures = ""
    if has_plots:
        recall = plots.parity_bars(rows, "recall_accuracy", "recall accuracy (share of queries)", upper=1.0)
        text = plots.parity_bars(rows, "text_loss", "text loss (nats per token)")
        figures = figure(recall, "Recall accuracy by row", "How much is recalled? Longer is better.", rows, "recall_accuracy")
        figures += figure(text, "Text loss by row", "How well is text predicted? Shorter is better.", rows, "text_loss")
        for name in tasks:
            bars = plots.parity_bars(rows, name, f"{name} (share of answers)", upper=1.0)
            figures += figure(bars, f"Accuracy on {name} by row", "How much is answered? Longer is better.", rows, name)
    return (
        f"<h2>How close is sparse to dense?</h2>\n{numbers}\n{notes}"
        "<details open><summary>What the rows and columns mean</summary>"
        f"{_definitions(meanings)}{_definitions(column_meanings)}</details>\n{figures}"
    )


def _by_group(rows: Sequence[Mapping[str, Any]]) -> str:
    """The accuracy of each task by depth, hops or rank, one table each."""
    tables = []
    for name, task in SYNTHETIC_TASKS.items():
        results = {row["name"]: row["tasks"][name] for row in rows if name in (row.get("tasks") or {})}
        key = f"by_{task.grouping}"
        n_groups = max((len(result.get(key) or ()) for result in results.values()), default=0)
        if n_groups:
            header = ["row", *(_group_title(task.grouping, i, n_groups) for i in range(n_groups))]
            cells = [[row, *(format_cell(name, value) for value in result[key])] for row, result in results.items()]
            tables.append(table(f"{name}: accuracy by {task.grouping}", header, cells))
    return f"<h2>Where do the tasks fail?</h2>\n{''.join(tables)}" if tables else ""


def _group_title(grouping: str, i: int, n_groups: int) -> str:
    if grouping == "depth":
        return f"depth {100 * i // n_groups}-{100 * (i + 1) // n_groups}%"
    return f"{i} hops" if grouping == "hops" else f"rank {i + 1}"


def _by_place(report: Mapping[str, Any], key: str, has_plots: bool) -> str:
    """Coverage by layer, or loss by position: a plot and its numbers."""
    series = dict(report.get(key) or {})
    is_coverage = key == "coverage_by_layer"
    places = list(range(max(map(len, series.values()), default=0))) if is_coverage else series.pop("positions", [])
    if not series or not places:
        return ""
    if is_coverage:
        title, place = "How much of the attention does the selection hold, layer by layer?", "layer"
        x_label, y_label = "layer", "coverage (share of attention mass)"
        caption = "Coverage is the share of dense attention mass that the keys read hold; 1 means nothing is lost."
    else:
        title, place = "Does the loss grow with position?", "up to position"
        x_label, y_label = "position in the sequence (tokens, upper end of bucket)", "text loss (nats per token)"
        caption = (
            "Sparse attention reads few keys late in a sequence; differences near 0 there mean that it misses nothing. Bars "
            "are standard errors over the same rows."
        )
    drawn = ""
    if has_plots:
        order = [row["name"] for row in report["rows"]]
        if is_coverage or "dense" not in series:
            svg = plots.lines_by_row(places, series, order, name=key, x_label=x_label, y_label=y_label, is_share=is_coverage)
            drawn = figure(svg, f"{y_label} against {x_label}, one line per row of the table", caption)
        else:
            differences, y_label_plot = _loss_differences(report, series), "minus dense (nats per token)"
            svg = plots.differences_by_row(places, differences, order, name=key, x_label=x_label, y_label=y_label_plot)
            drawn = figure(svg, f"{y_label_plot} against {x_label}, one row of the table beside another", caption)
    cells = [
        [str(where), *("-" if i >= len(values) or values[i] is None else f"{values[i]:.3f}" for values in series.values())]
        for i, where in enumerate(places)
    ]
    shown = table(y_label, [place, *series], cells)
    numbers = f"<details{'' if has_plots else ' open'}><summary>The numbers</summary>{shown}</details>"
    return f"<h2>{title}</h2>\n{drawn}{numbers}"


def _loss_differences(
    report: Mapping[str, Any], series: Mapping[str, Sequence[float | None]]
) -> dict[str, list[tuple[float | None, float | None]]]:
    """(mean, standard error) of each row minus dense by position; without an error where the report has none."""
    measured = report.get("loss_difference_by_position") or {}
    differences = {}
    for row, values in series.items():
        if row in measured:
            differences[row] = [_mean_and_error(each) for each in measured[row]]
        elif row != "dense":
            pairs = zip(values, series["dense"], strict=True)
            differences[row] = [(None if a is None or b is None else a - b, None) for a, b in pairs]
    return differences


def _curves(entries: Sequence[Mapping[str, Any]]) -> str:
    loss = plots.training_curves(entries, "loss", STAGES, "training loss (nats per token)")
    kl = plots.training_curves(entries, "kl", STAGES, "KL (nats, summed over layers)", is_log=True)
    of_loss = "Loss on training batches, all kinds of data together."
    of_kl = (
        "Divergence of the indexer's distribution from the attention's, over all visible keys in a dense warm-up and over the "
        "selected ones elsewhere; logarithmic scale."
    )
    parts = []
    for svg, title, subject, caption in (
        (loss, "Did the model keep learning?", "Training loss by step, one panel per stage", of_loss),
        (kl, "Did the indexer learn where attention looks?", "Indexer KL by step, one panel per stage", of_kl),
    ):
        parts += [f"<h2>{title}</h2>", figure(svg, subject, caption)] if svg else []
    return "\n".join(parts)


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    header = ["stage", "steps", "tokens", "time", "compilation", "tokens/s", "last metrics"]
    cells = []
    for stage_name, stage in stages.items():
        seconds, tokens = stage.get("seconds"), stage.get("tokens")
        final = stage.get("final") or {}
        last = ", ".join(f"{name} {final[name]:.4g}" for name in ("loss", "accuracy", "kl") if final.get(name) is not None)
        timed = stage.get("timed_tokens")
        rate = f"{timed / seconds:,.0f}" if timed and seconds else "-"
        times = [_time(seconds), _time(stage.get("compile_seconds"))]
        cells.append([stage_name, _count(stage.get("steps")), _count(tokens), *times, rate, last or "-"])
    return f"<h2>How long did it take?</h2>\n{table('Time without compilation; tokens/s over the whole stage', header, cells)}"


def _facts(title: str, facts: Any) -> str:
    if not facts:
        return ""
    values = flatten(facts) if isinstance(facts, Mapping) else {"": facts}
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape("-" if value is None else str(value))}</td></tr>'
        for name, value in values.items()
        if value != []
    )
    return f'<h2>{title}</h2>\n<div class="scroll"><table class="facts">{cells}</table></div>'


def _config(config: Any) -> str:
    if not config:
        return ""
    text = escape(json.dumps(config, indent=2, sort_keys=True))
    return f"<h2>What was configured?</h2>\n<details><summary>The whole configuration</summary><pre>{text}</pre></details>"


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    return (
        f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>' for term, meaning in pairs)}</dl>" if pairs else ""
    )


def _count(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _time(seconds: Any) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
