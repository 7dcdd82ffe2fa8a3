"""Parts of a page: figures, tables and cells as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def format_cell(column: str, value: Any) -> str:
    """One number of the parity table as text; a dash for None."""
    if value is None:
        return "-"
    return f"{value:.1f}" if column == "keys_per_query" else f"{value:.3f}"


def figure(svg: str | None, subject: str, caption: str, rows: Sequence[Mapping[str, Any]] = (), metric: str = "") -> str:
    """An SVG with its caption; the alternative text names the subject and, given rows, their values."""
    if svg is None:
        return ""
    values = "; ".join(f"{row['name']} {format_cell(metric, row[metric])}" for row in rows if row.get(metric) is not None)
    label = escape(f"{subject}: {values}." if values else f"{subject}.", quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>\n"


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is wide; the first cell of a row is its head."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>\n'
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )
