"""The figure of a sweep: one panel per quantity, a point per seed, the mean through them, dense attention as a band."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa_jax.evals.parity import BEFORE
from dsa_jax.extras import import_extra
from dsa_jax.run.files import atomic_write_bytes
from dsa_jax.sweeps.summary import Answer, answers

_NOT_SHOWN = ("keys per query",)
_COLOUR, _DENSE = "#2a6fb0", "#d9730d"
_PANELS_PER_ROW = 3


def plot_ablation(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure as a PNG.

    Raises:
        RunError: when the file cannot be written.
        MissingExtraError: when matplotlib is not installed, with the command that installs it.
    """
    matplotlib = import_extra("matplotlib.figure", extra="plot", purpose="the plot")
    figure = matplotlib.Figure(figsize=figure_size(result), layout="constrained")
    draw_ablation(figure, result)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    atomic_write_bytes(path, image.getvalue())


def figure_size(result: Mapping[str, Any]) -> tuple[float, float]:
    """Width and height in inches that `draw_ablation` needs."""
    _, variants, names, on_axis = _content(result)
    height = 2.9 if on_axis else 1.0 + 0.32 * len(variants)
    return 11.5, 0.5 + height * -(-len(names) // _PANELS_PER_ROW)


def draw_ablation(figure: Any, result: Mapping[str, Any]) -> None:
    """Fill a matplotlib figure; its layout should be constrained."""
    dense, variants, names, on_axis = _content(result)
    n_rows = -(-len(names) // _PANELS_PER_ROW)
    figure.suptitle(result["question"], fontsize=12)
    panels = figure.subplots(n_rows, min(len(names), _PANELS_PER_ROW), squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        (_along_axis if on_axis else _by_name)(panel, name, variants, result["axis"])
        if dense is not None and name in dense.quantities:
            _mark_dense(panel, dense.quantities[name], upright=not on_axis)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)


def _content(result: Mapping[str, Any]) -> tuple[Answer | None, list[Answer], list[str], bool]:
    """Dense attention, the variants, the quantities shown, and whether the variants have places on an axis."""
    lines = answers(result)
    dense = next((line for line in lines if line.name == BEFORE.name), None)
    variants = [line for line in lines if line is not dense]
    names = [n for n in dict.fromkeys(n for line in variants for n in line.quantities) if n not in _NOT_SHOWN]
    return dense, variants, names, all(line.place is not None for line in variants)


def _along_axis(panel: Any, name: str, variants: Sequence[Answer], axis: str) -> None:
    lines = sorted((line for line in variants if name in line.quantities), key=lambda line: line.place or 0.0)
    # By rank, not by value: variants mostly double, and zero may be among them.
    for rank, line in enumerate(lines):
        values = line.quantities[name].values
        panel.plot([rank] * len(values), values, "o", color=_COLOUR, alpha=0.45, markersize=4)
    means = [line.quantities[name].mean for line in lines]
    panel.plot(range(len(lines)), means, color=_COLOUR, linewidth=1.6, label="mean (points: seeds)")
    panel.set_xticks(range(len(lines)), [f"{line.place:g}" for line in lines])
    panel.set_xlabel(axis)
    panel.set_ylabel(name)


def _by_name(panel: Any, name: str, variants: Sequence[Answer], axis: str) -> None:
    del axis  # the names of the variants say it
    for height, line in enumerate(variants):
        if name in line.quantities:
            spread = line.quantities[name]
            panel.plot(spread.values, [height] * len(spread.values), "o", color=_COLOUR, alpha=0.45, markersize=4)
            label = None if panel.get_legend_handles_labels()[0] else "mean (points: seeds)"
            panel.plot([spread.mean], [height], "|", color=_COLOUR, markersize=14, markeredgewidth=2, label=label)
    first = panel.get_subplotspec().is_first_col()
    panel.set_yticks(range(len(variants)), [line.name if first else "" for line in variants])
    panel.set_ylim(len(variants) - 0.5, -0.5)
    panel.set_xlabel(name)


def _mark_dense(panel: Any, spread: Any, *, upright: bool) -> None:
    line, span = (panel.axvline, panel.axvspan) if upright else (panel.axhline, panel.axhspan)
    line(spread.mean, color=_DENSE, linestyle="--", linewidth=1.2, label=BEFORE.name)
    if len(spread.values) > 1:
        span(min(spread.values), max(spread.values), color=_DENSE, alpha=0.12, linewidth=0)
