"""The plots of a report as inline SVG that follows the page's light or dark colours."""

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# Readable on white and on near-black; a row keeps its colour through all plots.
_COLOURS = ("#3b82c4", "#d9730d", "#2f9e6e", "#9b6bd3", "#d1495b", "#8a8f98", "#b8860b")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Placeholder of the page's text colour until the SVG is inlined.
_INK = "#010203"
_MOST_POINTS = 1000
_MOST_COLUMNS = 48
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}

Entries = Sequence[Mapping[str, Any]]


def training_curves(entries: Entries, metric: str, stages: Iterable[str], label: str, *, is_log: bool = False) -> str | None:
    """`metric` over the steps of each stage that logged it, one panel per stage; None when none did.

    Beyond 1000 entries of a stage every n-th is drawn; `label` is that of the vertical axis, with unit, which is logarithmic
    with `is_log` where all values are positive.
    """
    series = {stage: [(e["step"], e[metric]) for e in entries if e["stage"] == stage and metric in e] for stage in stages}
    series = {stage: points for stage, points in series.items() if points}
    if not series:
        return None

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(series), squeeze=False)[0]
        for panel, (stage, points) in zip(panels, series.items(), strict=True):
            points = _thin(points)
            steps, values = zip(*points, strict=True)
            panel.plot(steps, values, color=_COLOURS[0], linewidth=1.4, marker="o" if len(points) == 1 else None)
            panel.set_title(stage)
            panel.set_xlabel("step")
            panel.grid(True)
            if is_log and all(value > 0 for value in values if math.isfinite(value)):
                panel.set_yscale("log")
        panels[0].set_ylabel(label)

    return _svg(draw, f"curves-{metric}", width=min(8.4, 1.2 + 3.6 * len(series)), height=2.7)


def parity_bars(rows: Entries, metric: str, label: str, *, upper: float | None = None) -> str | None:
    """One horizontal bar per row of the parity table that has `metric`; None when none has.

    `label` is that of the horizontal axis, with unit, which ends at `upper` or a little beyond the longest bar.
    """
    shown = [(i, row["name"], row[metric]) for i, row in enumerate(rows) if _is_number(row.get(metric))]
    if not shown:
        return None

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for place, (i, _, value) in enumerate(shown):
            panel.barh(place, value, color=_colour(i), height=0.62)
            panel.annotate(f"{value:.3f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
        panel.set_yticks(range(len(shown)), [name for _, name, _ in shown])
        panel.invert_yaxis()
        longest = max(value for *_, value in shown)
        # Room for the number behind the longest bar.
        panel.set_xlim(0, 1.14 * (upper if upper is not None else longest or 1.0))
        if upper is not None:
            panel.set_xticks([upper * k / 4 for k in range(5)])
        panel.set_xlabel(label)
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)

    return _svg(draw, f"parity-{metric}", width=8.4, height=0.9 + 0.34 * len(shown))


def lines_by_row(
    places: Sequence[float | int],
    series: Mapping[str, Sequence[float | None]],
    order: Sequence[str],
    *,
    name: str,
    x_label: str,
    y_label: str,
    is_share: bool = False,
) -> str | None:
    """One line per row of the parity table; None when there is nothing to draw.

    Args:
        places: horizontal positions.
        series: values by row name, None or NaN where missing.
        order: row names of the whole table: a row's place in it decides its colour and marker.
        name: unique among the plots of the page.
        x_label: title of the horizontal axis, with unit.
        y_label: title of the vertical axis, with unit.
        is_share: vertical axis from 0 to 1.
    """
    shown = {row: _with_gaps(values) for row, values in series.items() if any(_is_number(value) for value in values)}
    if not shown or not len(places):
        return None
    order = [*order, *(row for row in shown if row not in order)]

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        for row, values in shown.items():
            i = order.index(row)
            panel.plot(
                places, values, color=_colour(i), marker=_MARKERS[i % len(_MARKERS)], markersize=5, linewidth=1.4, label=row,
                alpha=0.9,
            )  # fmt: skip
        panel.set_xlabel(x_label)
        panel.set_ylabel(y_label)
        panel.set_xticks(places if len(places) <= 16 else places[:: math.ceil(len(places) / 16)])
        if is_share:
            panel.set_ylim(0, 1.04)
        panel.grid(True, axis="y")
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _svg(draw, name, width=8.4, height=3.0)


def differences_by_row(
    places: Sequence[float | int | str],
    series: Mapping[str, Sequence[tuple[float | None, float | None]]],
    order: Sequence[str],
    *,
    name: str,
    x_label: str,
    y_label: str,
) -> str | None:
    """Differences to dense, which is the line at 0, with their standard errors; None when there is nothing to draw.

    The rows stand side by side at each place, so that none hides another.

    Args:
        places: what stands below each group of points.
        series: (mean, standard error) at each place by row name; None or NaN where missing.
        order, name, x_label, y_label: as in `lines_by_row`.
    """
    shown = {row: points for row, points in series.items() if any(_is_number(mean) for mean, _ in points)}
    if not shown or not len(places):
        return None
    order = [*order, *(row for row in shown if row not in order)]

    def draw(figure: Any) -> None:
        panel = figure.subplots()
        panel.axhline(0.0, color=_INK, linewidth=1.0, linestyle="--", alpha=0.6, label="dense")
        step = 0.7 / len(shown)
        for number, (row, points) in enumerate(shown.items()):
            i, shift = order.index(row), (number - (len(shown) - 1) / 2) * step
            means, errors = (_with_gaps(column) for column in zip(*points, strict=True))
            panel.errorbar(
                [place + shift for place in range(len(places))], means,
                yerr=[0.0 if math.isnan(error) else error for error in errors], color=_colour(i),
                marker=_MARKERS[i % len(_MARKERS)], markersize=5, linestyle="none", elinewidth=1.4, capsize=3, label=row,
            )  # fmt: skip
        stride = math.ceil(len(places) / 16)
        panel.set_xticks(range(0, len(places), stride), [str(place) for place in places[::stride]])
        panel.set_xlim(-0.5, len(places) - 0.5)
        panel.set_xlabel(x_label)
        panel.set_ylabel(y_label)
        panel.grid(True, axis="y")
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    return _svg(draw, name, width=8.4, height=3.0)


def heat_maps(looks: Sequence[str], measures: Mapping[str, Sequence[Sequence[float]]], *, name: str) -> str | None:
    """One map of shares by layer and look for each measure that has any; None when none has.

    Args:
        looks: what stands below each column; beyond 48 every n-th is drawn, the last one included.
        measures: by title, the values of each layer at each look, from 0 to 1; NaN where there is none, left blank.
        name: unique among the plots of the page.
    """
    shown = {title: rows for title, rows in measures.items() if any(_is_number(value) for row in rows for value in row)}
    if not shown or not looks:
        return None
    stride = math.ceil(len(looks) / _MOST_COLUMNS)
    kept = range((len(looks) - 1) % stride, len(looks), stride)

    def draw(figure: Any) -> None:
        import matplotlib
        import numpy as np

        n_columns = min(2, len(shown))
        panels = figure.subplots(math.ceil(len(shown) / n_columns), n_columns, squeeze=False)
        # With many colours the bar beside the maps would become a bitmap.
        colours = matplotlib.colormaps["viridis"].resampled(20)
        for panel, (title, rows) in zip(panels.flat, shown.items(), strict=False):
            values = np.ma.masked_invalid([[row[i] for i in kept] for row in rows])
            mesh = panel.pcolormesh(values, cmap=colours, vmin=0.0, vmax=1.0, edgecolors="face", linewidth=0.3)
            panel.set_title(title)
            every = math.ceil(len(kept) / 3)
            panel.set_xticks([i + 0.5 for i in range(0, len(kept), every)], [looks[i] for i in kept[::every]], fontsize=8)
            every = math.ceil(len(rows) / 8)
            panel.set_yticks([i + 0.5 for i in range(0, len(rows), every)], range(0, len(rows), every))
            panel.set_ylabel("layer")
            panel.invert_yaxis()
        for panel in panels.flat[len(shown) :]:
            panel.set_visible(False)
        figure.colorbar(mesh, ax=panels, fraction=0.03)

    n_layers = max(len(rows) for rows in shown.values())
    height = (1.0 + min(0.12 * n_layers + 0.5, 3.0)) * math.ceil(len(shown) / 2)
    return _svg(draw, name, width=8.4, height=height)


def _svg(draw: Callable[[Any], None], name: str, *, width: float, height: float) -> str:
    """Draw on a new figure and return an `<svg>` element without prolog; the same input gives the same text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # The salt makes the ids of the plots of one page distinct.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", svg)
    return svg.replace(_INK, "currentColor")


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _thin(points: list[Any]) -> list[Any]:
    """At most about 1000 points, the last one included."""
    stride = math.ceil(len(points) / _MOST_POINTS)
    return points[(len(points) - 1) % stride :: stride]


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)
