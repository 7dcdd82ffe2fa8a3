"""The report of a run: report.json for programs, report.html for readers, a table for the terminal."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa_jax.foreign import printable
from dsa_jax.report.page import columns_of, render_page, render_progress, with_tasks
from dsa_jax.report.parts import format_cell
from dsa_jax.report.verdict import about, verdict
from dsa_jax.run.files import atomic_write_text
from dsa_jax.run.metrics import read_metrics


def write_report(run_dir: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write report.html and then report.json, each atomically, into the run directory.

    Args:
        run_dir: directory with metrics.jsonl, the training curves.
        report: `name`; `rows`, each with `name`, `recall_accuracy`, `text_loss` (nats per token), `coverage` and
            `keys_per_query`, None where not measured, and optionally `tasks` (by name `accuracy`, `loss` and a list of
            accuracies `by_depth`, `by_hops` or `by_rank`); and, each optional, `stages` (by stage `steps`, `seconds`,
            `compile_seconds`, `tokens`, `final`), `remarks` (sentences below the table), `coverage_by_layer` (by row),
            `loss_by_position` (`positions`, the upper end of each bucket, and losses by row), `loss_difference_by_position`
            (by row `mean` and `standard_error` of the difference to dense in each bucket), `costs` (see
            `dsa_jax.costs.comparison`), `setup` (see `verdict.about`), `samples` (held-out text with its continuations, each
            with `prompt`, `text` and `continuations` by row), `config`, `environment`, `corpus`. NaN and infinities become
            null.

    Raises:
        RunError: when a file cannot be written.
    """
    directory = Path(run_dir)
    plain = to_plain(report)
    atomic_write_text(directory / "report.html", render_page(plain, *_logs(directory)))
    atomic_write_text(directory / "report.json", json.dumps(plain, indent=2, allow_nan=False) + "\n")


def write_progress(run_dir: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write report.html as far as a run has come: its curves and what held-out rows said; `content` has `name`, `config`.

    Raises:
        RunError: when the file cannot be written.
    """
    directory = Path(run_dir)
    atomic_write_text(directory / "report.html", render_progress(to_plain(content), *_logs(directory)))


def _logs(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return read_metrics(directory / "metrics.jsonl"), read_metrics(directory / "evaluations.jsonl")


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The parity table as aligned text; a dash where a value is None or missing."""
    columns = columns_of(rows)
    lines = [[title for _, title in columns]]
    for row in map(with_tasks, rows):
        lines.append([str(row["name"]), *(format_cell(name, row.get(name)) for name, _ in columns[1:])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def format_row(row: Mapping[str, Any]) -> str:
    """A row of the parity table in one line, as it comes: its name, then every measure that it has."""
    cells = with_tasks(row)
    measures = [f"{title} {format_cell(key, cells[key])}" for key, title in columns_of([row])[1:] if cells.get(key) is not None]
    return f"{row['name']}: {', '.join(measures)}"


def format_verdict(report: Mapping[str, Any]) -> str:
    """What the report is of and the sentences of the verdict, one per line, as report.html has them."""
    return "\n".join([*format_about(report), *verdict(to_plain(report)).lines()])


def format_about(report: Mapping[str, Any]) -> list[str]:
    """What the report is of, in a line; none where it does not say."""
    sentence = about(to_plain(report))
    return [printable(sentence, most=len(sentence))] if sentence else []


def format_samples(report: Mapping[str, Any]) -> str:
    """Held-out text and its continuations, a line each, with control characters spelled out."""
    lines = []
    for sample in to_plain(report).get("samples") or ():
        shown = {"prompt": sample["prompt"], "the text": sample["text"], **sample["continuations"]}
        lines += ["", *(f"{name}: {printable(text, most=len(text))}" for name, text in shown.items())]
    return "\n".join(lines)


def to_plain(value: Any) -> Any:
    """`value` as JSON values: numpy and JAX values as numbers and lists, dataclasses as objects, NaN and infinities as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(name): to_plain(item) for name, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
