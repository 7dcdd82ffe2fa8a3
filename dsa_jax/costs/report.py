"""Tables and plot of what `dsa_jax.costs.model` and `dsa_jax.costs.measured` compute."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsa_jax.config import ModelConfig
from dsa_jax.costs.model import (
    ATTENTIONS,
    N_POINTS,
    PHASES,
    Rates,
    cache_bytes_per_token,
    dollars_per_million_tokens,
    pays_from,
    require_indexer,
    training_flops_per_token,
)
from dsa_jax.extras import import_extra

CACHE_DTYPES = ("bfloat16", "fp8")
_SHOWN = 8

PUBLISHED_POSITIONS = (0, 2048, 8192, 16384, 32768, 65536, 98304, 131072)
PUBLISHED_DOLLARS = {
    ("prefill", "dense"): (0.0529, 0.0624, 0.0912, 0.1295, 0.2061, 0.3593, 0.5125, 0.6658),
    ("prefill", "sparse"): (0.0611, 0.0729, 0.1009, 0.1067, 0.1182, 0.1412, 0.1641, 0.1871),
    ("decode", "dense"): (0.0705, 0.1031, 0.2008, 0.3310, 0.5915, 1.1124, 1.6334, 2.154),
    ("decode", "sparse"): (0.0952, 0.1444, 0.1506, 0.1572, 0.1703, 0.1965, 0.2228, 0.2491),
}
"""Dollars per million tokens of the DeepSeek-V3.2-Exp report, figure 3, read off its vector paths."""


def cost_tables(config: ModelConfig, rates: Rates, max_length: int) -> dict[str, Any]:
    """Everything the report shows, as JSON values: positions, dollars by phase and attention, cache bytes, training FLOPs.

    Raises:
        ConfigError: when the model has no indexer.
    """
    require_indexer(config)
    positions = [round(i * max_length / N_POINTS) for i in range(N_POINTS + 1)]
    dollars = {
        phase: {
            attention: dollars_per_million_tokens(config, positions, phase=phase, attention=attention, rates=rates)
            for attention in ATTENTIONS
        }
        for phase in PHASES
    }
    lengths = positions[1:]
    training = {a: [training_flops_per_token(config, length, a) for length in lengths] for a in ATTENTIONS}
    return {
        "positions": positions,
        "dollars_per_million_tokens": dollars,
        "cache_bytes_per_token": {
            dtype: {attention: cache_bytes_per_token(config, dtype, attention) for attention in ATTENTIONS}
            for dtype in CACHE_DTYPES
        },
        "training_flops_per_token": {"lengths": lengths, **training},
        "pays_from": {
            **{phase: pays_from(dollars[phase]["dense"], dollars[phase]["sparse"], positions) for phase in PHASES},
            "training": pays_from(training["dense"], training["sparse"], lengths),
        },
    }


def format_costs(tables: dict[str, Any]) -> str:
    """The tables of `cost_tables` as aligned text at eight positions, doubling up to the longest."""
    positions, shown = tables["positions"], _shown(tables)
    lines = _dollar_lines(tables)
    training = tables["training_flops_per_token"]
    lines.append(_row("sequence length", [f"{positions[i]:,}" for i in shown[1:]], skip=1))
    for attention in ATTENTIONS:
        values = [training[attention][i - 1] for i in shown[1:]]
        lines.append(_row(f"training, {attention}, GFLOP per token", [f"{value / 1e9:.1f}" for value in values], skip=1))
    lines.append("")
    for dtype, sizes in tables["cache_bytes_per_token"].items():
        dense, sparse = sizes["dense"], sizes["sparse"]
        lines.append(f"cache per token, {dtype}: {dense:,.0f} bytes dense, {sparse:,.0f} sparse ({sparse / dense - 1:+.0%})")
    return "\n".join(lines + _pays_lines(tables))


def format_measured(tables: dict[str, Any]) -> str:
    """The tables of `cost_measured.measured_tables` as aligned text: what was measured, then eight positions of its range."""
    measured = tables["measured"]
    lines = [f"measured on {measured['device']}: attention alone, without projections, MLP and experts"]
    for curve, rows in measured["rows"].items():
        for row in rows:
            lengths = ", ".join(f"{length:,}" for length in row["lengths"])
            way = f"{row['implementation']}, {row['dtype']}, {row['queries']} queries a call"
            lines.append(f"  {curve}: {row['op']} ({way}) at {lengths} keys")
    return "\n".join([*lines, *_dollar_lines(tables), "", *_pays_lines(tables)])


def _shown(tables: dict[str, Any]) -> list[int]:
    n = len(tables["positions"])
    return sorted({0, *(max(1, n - 1 >> i) for i in range(_SHOWN - 1))})


def _dollar_lines(tables: dict[str, Any]) -> list[str]:
    shown = _shown(tables)
    lines = [_row("position", [f"{tables['positions'][i]:,}" for i in shown])]
    for phase, curves in tables["dollars_per_million_tokens"].items():
        for attention, values in curves.items():
            lines.append(_row(f"{phase}, {attention}, $ per million", [f"{values[i]:.4f}" for i in shown]))
        ratios = [curves["dense"][i] / curves["sparse"][i] for i in shown]
        lines.append(_row(f"{phase}, times cheaper", [f"{ratio:.2f}" for ratio in ratios]))
    return lines


def _pays_lines(tables: dict[str, Any]) -> list[str]:
    lines = []
    for name, position in tables["pays_from"].items():
        where = "is never cheaper in this range" if position is None else f"is cheaper from {position:,} tokens on"
        if position == tables["positions"][0]:
            where = "is cheaper in the whole range"
        lines.append(f"{name}: sparse {where}")
    return lines


def draw_costs(axes: Any, tables: dict[str, Any], phase: str) -> None:
    """Dense and sparse dollars per million tokens by position on matplotlib axes, with labels, but without a title."""
    thousands = [position / 1024 for position in tables["positions"]]
    for attention in ATTENTIONS:
        axes.plot(thousands, tables["dollars_per_million_tokens"][phase][attention], label=attention)
    what = "dollars per million tokens"
    if "measured" in tables:
        what = f"attention alone, measured on {tables['measured']['device']},\n{what}"
    axes.set(xlabel="token position, K", ylabel=what, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def plot_costs(tables: dict[str, Any], title: str, path: Path) -> None:
    """The two curves, prefill and decode, as a PNG.

    Raises:
        MissingExtraError: when matplotlib is not installed, with the command that installs it.
    """
    matplotlib = import_extra("matplotlib.figure", extra="plot", purpose="the plot")
    figure = matplotlib.Figure(figsize=(10, 4), layout="constrained")
    for axes, phase in zip(figure.subplots(1, len(PHASES)), PHASES, strict=True):
        draw_costs(axes, tables, phase)
        axes.set_title(f"{title}, {phase}")
    figure.savefig(path, dpi=120)


def _row(name: str, cells: Sequence[str], *, skip: int = 0) -> str:
    return f"{name:34}" + " " * 10 * skip + "".join(f"{cell:>10}" for cell in cells)
