"""One page of all results: runs, devices, seeds, times, and the file of each number."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsa_jax.run.files import RunError, atomic_write_text, read_regular
from dsa_jax.sweeps.summary import environments, format_table, read_result, total_seconds

SWEEPS = "ablations"
PAGE = "README.md"
_TITLE = "# Results"
_WRITTEN_BY = "Written by `python -m experiments.summarize` from the files beside it"


def write_results(directory: Path) -> Path:
    """Write the page of a results directory to its README.md; returns its path.

    Raises:
        RunError: where there is no such directory, a result file cannot be read, or that README.md is not such a page.
    """
    page = directory / PAGE
    if not directory.is_dir():
        raise RunError(f"results {directory} is no directory; expected one with results. Choose another --results.")
    if os.path.lexists(page):
        try:
            text = read_regular(page).decode("utf-8", errors="replace")
        except OSError as error:
            raise RunError(f"{page} would be replaced, and cannot be read: {error.strerror or error}.") from error
        if not text.startswith(f"{_TITLE}\n\n{_WRITTEN_BY}"):
            raise RunError(f"{page} is not a page of results and would be lost. Choose another --results, or move it away.")
    atomic_write_text(page, render_results(directory))
    return page


def render_results(directory: Path) -> str:
    """The page of a results directory: its sweeps (`ablations/*.json`) in full, its other pages (`*.md`) by title and command.

    Raises:
        RunError: for a result file or a page that cannot be read.
    """
    sweeps = [read_result(path) for path in sorted((directory / SWEEPS).glob("*.json"))]
    lines = [
        _TITLE,
        "",
        f"{_WRITTEN_BY}: every number is in the file named with it.",
        "",
        "| sweep | runs | seeds | minutes | device and versions |",
        "|---|---|---|---|---|",
        *(_sweep_line(result) for result in sweeps),
        "",
        "| other results | command |",
        "|---|---|",
        *(_page_line(path) for path in sorted(directory.glob("*.md")) if path.name != PAGE),
        "",
    ]
    for result in sweeps:
        name = result["name"]
        lines += [
            f"## {result['question']}",
            "",
            f"![{result['question']}]({SWEEPS}/{name}.png)",
            "",
            *format_table(result),
            "",
            f"From [{SWEEPS}/{name}.json]({SWEEPS}/{name}.json): `{result['command']}`",
            "",
        ]
    return "\n".join(lines)


def _sweep_line(result: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    where = "; ".join(environments(result))
    name = f"[{result['question']}]({SWEEPS}/{result['name']}.md)"
    return f"| {name} | {len(result['runs'])} | {seeds} | {total_seconds(result) / 60:.0f} | {where} |"


def _page_line(path: Path) -> str:
    try:
        text = read_regular(path, follow=True).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is no page that can be read ({error}). Move it away.") from error
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    commands = [" ".join(command.split()) for command in re.findall(r"^Command:\s+`([^`]+)`", text, re.MULTILINE)]
    return f"| [{title[1] if title else path.stem}]({path.name}) | " + "<br>".join(f"`{c}`" for c in commands) + " |"
