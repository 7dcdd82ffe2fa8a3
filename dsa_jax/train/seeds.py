"""The same retrofit over several seeds: one run directory each, one table of means and spreads."""

import copy
import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsa_jax.config import Config
from dsa_jax.parallel.processes import is_main
from dsa_jax.train.retrofit import retrofit
from dsa_jax.train.rundir import RunError, atomic_write_text, describe_environment

_LOG = logging.getLogger(__name__)
COLUMNS = ("recall_accuracy", "text_loss", "coverage", "keys_per_query")


def retrofit_seeds(config: Config, workdir: Path, *, command: str, tensorboard: bool = False) -> dict[str, Any] | None:
    """Run `retrofit` for each of `config.seeds` under `workdir/seed_<n>`, then write seeds.json and seeds.md.

    Args:
        config: the recipe; its `seed` is replaced by each of `seeds`.
        workdir: holds the runs; the same call continues an interrupted one.
        command: what the user typed, recorded with the results.
        tensorboard: as in `retrofit`.

    Returns:
        The summary (also in seeds.json), or None if a signal stopped a run.
    """
    config.validate()
    reports = {}
    for number, seed in enumerate(config.seeds, start=1):
        _LOG.info("seed %d (%d of %d)", seed, number, len(config.seeds))
        own = copy.deepcopy(config)
        own.seed, own.seeds = seed, ()
        report = retrofit(own, workdir / f"seed_{seed}", tensorboard=tensorboard)
        if report is None:
            return None
        reports[seed] = report
    summary = {
        "name": config.name,
        "command": command,
        "seeds": list(config.seeds),
        "rows": summarise([report["rows"] for report in reports.values()]),
        "seconds": {
            str(seed): {
                stage: round(entry["seconds"] + entry.get("compile_seconds", 0.0), 1)
                for stage, entry in report["stages"].items()
            }
            for seed, report in reports.items()
        },
        "environment": describe_environment(),
    }
    if is_main():
        atomic_write_text(workdir / "seeds.json", json.dumps(summary, indent=1) + "\n")
        atomic_write_text(workdir / "seeds.md", format_markdown(summary))
        print(format_markdown(summary))
    return summary


def summarise(tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per name: for each column the values by seed, their mean, and the spread (largest minus smallest).

    Raises:
        RunError: where the tables have different rows.
    """
    names = [[row["name"] for row in table] for table in tables]
    if any(other != names[0] for other in names):
        raise RunError(f"the seeds' tables have different rows: {names}. Delete the run directories and start over.")
    result = []
    for rows in zip(*tables, strict=True):
        entry: dict[str, Any] = {"name": rows[0]["name"]}
        for column in COLUMNS:
            values = [row[column] for row in rows]
            entry[column] = (
                None
                if None in values
                else {"mean": statistics.fmean(values), "spread": max(values) - min(values), "values": values}
            )
        result.append(entry)
    return result


def format_markdown(summary: dict[str, Any]) -> str:
    """The summary as a page: table of mean and spread, command, seeds, device and versions."""

    def cell(entry: dict[str, Any] | None) -> str:
        return "" if entry is None else f"{entry['mean']:.3f} ± {entry['spread'] / 2:.3f}"

    where = summary["environment"]
    lines = [
        f"# {summary['name']}: parity over seeds {', '.join(map(str, summary['seeds']))}",
        "",
        "Mean over the seeds, ± half the distance between the largest and the smallest.",
        "",
        "| row | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
        *("| " + " | ".join([row["name"], *(cell(row[column]) for column in COLUMNS)]) + " |" for row in summary["rows"]),
        "",
        f"Command: `{summary['command']}`",
        "",
        f"Device: {where['device']['count']} x {where['device']['kind']}. Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        + ".",
        "",
        "Seconds per stage, compilation included: "
        + "; ".join(
            f"seed {seed}: " + ", ".join(f"{k} {v:.0f}" for k, v in stages.items())
            for seed, stages in summary["seconds"].items()
        )
        + ".",
        "",
    ]
    return "\n".join(lines)
