"""Sections of report.html about a run in training: how far it is, what held-out rows said, and how the selections are."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from dsa_jax.config import STAGES
from dsa_jax.report import plots
from dsa_jax.report.parts import figure, table

_SELECTION_MEASURES = (
    ("coverage", "coverage", "share of the dense attention mass on the selected keys"),
    ("entropy", "entropy", "near 1 where all keys are read about equally often, low where the same few serve all queries"),
    ("local_share", "local share", "share of the selected keys among the last topk"),
    ("overlap", "overlap", "share of the selected keys that the layer before selected, too"),
    ("indexer_recall", "index recall", "share of the indexer's own top-k keys among the selected"),
)


class Position(NamedTuple):
    """How far a run has come, in words: in its stage, and in all stages together."""

    in_stage: str
    in_all: str


def position_of(config: Mapping[str, Any], logged: Sequence[Mapping[str, Any]]) -> Position:
    """The last step that anything was logged of; `config` is that of the run as plain values."""
    steps = {stage: (config.get("train") or {}).get(stage, {}).get("steps", 0) for stage in STAGES}
    known = [(STAGES.index(entry["stage"]), entry["step"]) for entry in logged if entry["stage"] in STAGES]
    number, step = max(known, default=(0, 0))
    stage = STAGES[number]
    done = sum(steps[name] for name in STAGES[:number]) + step
    return Position(f"Stage {stage}, step {step} of {steps[stage]}", f"step {done} of {sum(steps.values())}")


def held_out_section(evaluations: Sequence[Mapping[str, Any]], has_plots: bool) -> str:
    """What held-out rows said in training: difference of sparse and dense by step, coverage of the layers at the last look."""
    if not evaluations:
        return ""
    header = ["stage", "step", "dense loss", "sparse loss", "difference", "lowest coverage", "mean coverage"]
    cells = []
    for entry in evaluations:
        coverage = [value for name, value in entry.items() if name.startswith("coverage_layer_")]
        losses = [f"{entry[name]:.3f}" for name in ("dense_loss", "sparse_loss")]
        change = f"{entry['difference']:+.3f} ± {entry['standard_error']:.3f}"
        spread = [f"{min(coverage):.3f}", f"{sum(coverage) / len(coverage):.3f}"]
        cells.append([str(entry["stage"]), str(entry["step"]), *losses, change, *spread])
    drawn = ""
    if has_plots:
        label = "sparse minus dense (nats)"
        drawn = figure(
            plots.training_curves(evaluations, "difference", STAGES, label),
            "Held-out loss of sparse minus dense by step",
            "What sparse attention loses to dense on the same held-out rows, as training goes on.",
        )
        drawn += _selection_maps(evaluations)
    numbers = table("Held-out rows while training", header, cells)
    return f"<h2>Does training close the gap?</h2>\n{drawn}{numbers}{_not_finite(evaluations)}"


def _selection_maps(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """How the selection of each layer was at each look."""
    looks = [f"{entry['stage']} {entry['step']}" for entry in evaluations]
    measures = {}
    for name, title, _ in _SELECTION_MEASURES:
        n_layers = max(len(_by_layer(entry, name)) for entry in evaluations)
        columns = [[*_by_layer(entry, name), *[math.nan] * n_layers][:n_layers] for entry in evaluations]
        measures[title] = [[column[layer] for column in columns] for layer in range(n_layers)]
    svg = plots.heat_maps(looks, measures, name="selection-health")
    meanings = " ".join(f"{title}: {meaning}." for _, title, meaning in _SELECTION_MEASURES if measures[title])
    named = ", ".join(title for title, rows in measures.items() if rows)
    subject = f"Selection of each layer at each look at held-out rows: {named}"
    return figure(svg, subject, f"{meanings} All but coverage over the queries that see more than topk keys.")


def _by_layer(entry: Mapping[str, Any], name: str) -> list[float]:
    """The values of a measure, layer by layer."""
    values: list[float] = []
    while (value := entry.get(f"{name}_layer_{len(values)}")) is not None:
        values.append(value)
    return values


def _not_finite(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """A doubt where a look met NaN or infinities, with the first layer that had them."""
    for entry in evaluations:
        counts = _by_layer(entry, "n_not_finite")
        if any(counts):
            layer = next(i for i, count in enumerate(counts) if count)
            text = (
                f"Doubtful: at {entry['stage']} step {entry['step']}, {counts[layer]:.0f} queries have values that are not "
                f"finite after layer {layer}, the first to have any."
            )
            return f'<p class="hint">{escape(text)}</p>\n'
    return ""
