"""Results of a sweep: values of each variant and quantity over the seeds, beside dense attention."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsa_jax.config.selections import BEFORE, eval_rows
from dsa_jax.evals.spread import Spread
from dsa_jax.run.files import RunError, read_regular

QUANTITIES = {
    "recall_accuracy": "recall accuracy",
    "text_loss": "text loss, nats per token",
    "coverage": "attention mass kept",
    "keys_per_query": "keys per query",
    "indexer_recall": "share of the indexer's top-k kept",
}
"""Titles of the columns of the parity table; tasks follow as `accuracy, <task>`."""


@dataclass(frozen=True)
class Answer:
    """One line of the table: a variant, its place on the axis, its quantities, and why seeds failed."""

    name: str
    place: int | float | None
    quantities: Mapping[str, Spread]
    failures: tuple[str, ...] = ()


def read_result(path: Path) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        RunError: where it cannot be read or is not one.
    """
    try:
        result = json.loads(read_regular(path, follow=True).decode("utf-8"))
        _check(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is no result of an ablation ({error}). Restore it or delete it.") from error
    return result


def _check(result: Any) -> None:
    """Require what the tables and pages read, of their kinds; ValueError, KeyError or TypeError names what is wrong."""
    for name, kind in (("name", str), ("question", str), ("axis", str), ("command", str), ("seeds", list), ("variants", list)):
        if not isinstance(result[name], kind):
            raise ValueError(f"{name} is {result[name]!r:.40}")
    if not isinstance(result["runs"], list):
        raise ValueError("its runs are not a list")
    for variant in result["variants"]:
        if not isinstance(variant["name"], str) or variant["row"] not in eval_rows() or not _is_number(variant["place"]):
            raise ValueError(f"the variant {variant!r:.40}")
    for run in result["runs"]:
        for row in run.get("rows", ()):
            values = quantities_of(row).values()
            if not isinstance(row["name"], str) or not all(map(_is_number, values)):
                raise ValueError(f"the row {row!r:.40}")
        if not isinstance(run["variant"], str) or not isinstance(run["key"], str) or type(run["seed"]) is not int:
            raise ValueError(f"the run {run!r:.40}")


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def quantities_of(row: Mapping[str, Any]) -> dict[str, float | None]:
    """A row of the parity table by the titles of its columns."""
    found = {words: row.get(column) for column, words in QUANTITIES.items()}
    for task, result in (row.get("tasks") or {}).items():
        found[f"accuracy, {task.replace('_', ' ')}"] = result["accuracy"]
    return found


def answers(result: Mapping[str, Any]) -> list[Answer]:
    """The lines of a result file: dense attention before the retrofit first, then the variants in order.

    Where variants start from dense models of their own, each has its dense line before it.
    """
    lines = []
    dense = {(run["seed"], run["variant"]): row for run in result["runs"] if (row := _row(run, BEFORE.title))}
    by_seed = {seed: row for (seed, _), row in dense.items()}
    is_shared = all(row == by_seed[seed] for (seed, _), row in dense.items())
    if by_seed and is_shared:
        lines.append(Answer(BEFORE.title, None, _spreads(list(by_seed.values()))))
    for variant in result["variants"]:
        own = [row for (_, name), row in dense.items() if name == variant["name"]]
        if own and not is_shared:
            lines.append(Answer(f"{variant['name']}, dense", None, _spreads(own)))
        runs = [run for run in result["runs"] if run["variant"] == variant["name"]]
        rows = [row for run in runs if (row := _row(run, eval_rows()[variant["row"]].title))]
        failures = tuple(f"seed {run['seed']}: {run['failed']}" for run in runs if "failed" in run)
        if runs:
            lines.append(Answer(variant["name"], variant["place"], _spreads(rows), failures))
    return lines


def _row(run: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((row for row in run.get("rows", ()) if row["name"] == name), None)


def _spreads(rows: list[Mapping[str, Any]]) -> dict[str, Spread]:
    tables = [quantities_of(row) for row in rows]
    names = list(dict.fromkeys(name for table in tables for name in table))
    spreads = {name: Spread.of([table.get(name) for table in tables]) for name in names}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def format_table(result: Mapping[str, Any]) -> list[str]:
    """The table of a sweep, as lines of Markdown: mean over the seeds, ± half the distance from largest to smallest."""
    lines = answers(result)
    names = list(dict.fromkeys(name for line in lines for name in line.quantities))

    def cell(line: Answer, name: str) -> str:
        return str(line.quantities[name]) if name in line.quantities else "failed" if line.failures else ""

    return [
        f"| {result['axis']} | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
        *("| " + " | ".join([line.name, *(cell(line, name) for name in names)]) + " |" for line in lines),
    ]


def _retired(result: Mapping[str, Any]) -> list[str]:
    """A line for what only an earlier revision can repeat, as `revision` of the sweep or of a variant says."""
    if "revision" in result:
        return [f"Revision {result['revision']} repeats this sweep; later ones lack its setting.", ""]
    retired = [variant for variant in result["variants"] if "revision" in variant]
    lines = [
        f"Revision {each['revision']} repeats the variant {each['name']!r}; later ones lack its setting." for each in retired
    ]
    return [*lines, ""] if lines else []


def format_markdown(result: Mapping[str, Any]) -> str:
    """The result file as a page: question, plot, table, command, seeds, device, versions and time."""
    failures = [f"- {line.name}, {failure}" for line in answers(result) for failure in line.failures]
    page = [
        f"# {result['question']}",
        "",
        f"![{result['question']}]({result['name']}.png)",
        "",
        f"Mean over seeds {', '.join(map(str, result['seeds']))}, ± half the distance between the largest and the smallest.",
        "Dense attention is shown as the retrofit found it; the sparse stage trains the model on, so text loss falls below it.",
        "",
        *format_table(result),
        "",
        *([*failures, ""] if failures else []),
        *_retired(result),
        f"Command: `{result['command']}`",
        "",
        *(f"{text}." for text in environments(result)),
        f"{len(result['runs'])} runs in {total_seconds(result) / 60:.0f} minutes, dense pretraining and compilation included.",
        "",
    ]
    return "\n".join(page)


def environments(result: Mapping[str, Any]) -> list[str]:
    """The devices and versions of the sweep's runs, each once."""
    found = [run["environment"] for run in result["runs"] if "environment" in run]
    texts = [
        f"{where['device']['count']} x {where['device']['kind']}, Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(where["versions"].items()))
        for where in found
    ]
    return list(dict.fromkeys(texts))


def total_seconds(result: Mapping[str, Any]) -> float:
    """Wall time of all training in seconds; training that several runs share counts once."""
    trained = {part["key"]: part["seconds"] for run in result["runs"] for part in run.get("trained", ())}
    return math.fsum(trained.values())
