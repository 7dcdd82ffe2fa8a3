"""Dollars of attention by position, from measured times of its ops. No speed is assumed; only attention is counted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsa_jax.config import ConfigError, ModelConfig
from dsa_jax.config.attention import FULL, SHARED
from dsa_jax.costs.model import ATTENTIONS, N_POINTS, PHASES, kind_costs, n_indexers, pays_from, require_indexer

Row = Mapping[str, Any]


class Part(NamedTuple):
    """One op of attention: any of `ops` will do, at `sizes` of `OpShape`, in so many layers.

    `grows`: its time depends on the length of the context, so that two lengths or more must be measured.
    """

    ops: tuple[str, ...]
    sizes: dict[str, Any]
    n_layers: int
    grows: bool


class Series(NamedTuple):
    """Measured seconds per query at ascending context lengths; `queries` were timed in one call."""

    op: str
    implementation: str
    dtype: str
    queries: int
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]


def attention_parts(config: ModelConfig) -> dict[tuple[str, str], list[Part]]:
    """The ops that attention consists of, by phase and attention; `dsa_jax.benchmarks` measures them under these names."""
    if others := sorted({layer.role for layer in config.layers()} - {FULL, SHARED}):
        raise ConfigError(
            f"model.attention.layer_types has {', '.join(others)} layers; expected full or shared ones, whose ops are known."
        )
    costs, indexer, n = kind_costs(config), config.attention.indexer, config.n_layers
    expanded, absorbed = costs.expanded._asdict(), costs.absorbed._asdict()
    topk = {"topk": indexer.topk}
    select = Part(
        ("index_topk",), {"index_heads": indexer.n_heads, "index_dim": indexer.head_dim, **topk}, n_indexers(config), True
    )
    return {
        ("prefill", "dense"): [Part(("dense_attention",), expanded, n, True)],
        ("prefill", "sparse"): [select, Part(("sparse_attention",), absorbed | topk, n, False)],
        ("decode", "dense"): [Part(("dense_attention",), absorbed, n, True)],
        ("decode", "sparse"): [select, Part(("decode", "decode_fp8"), absorbed | topk, n, False)],
    }


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The timed ops of files that `experiments.benchmark` (JSON Lines) or `dsa_jax.benchmarks.gpu_check` (one object) wrote.

    Rows without the sizes of an op, such as those of --op=layer, are left out; so are interpreted kernels, which are no
    measurement, and other libraries' kernels, except for dense attention: what sparse attention is compared with is the best
    there is.

    Raises:
        ConfigError: for a file that cannot be read or is neither.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            rows += [row for row in _parse(path.read_text(encoding="utf-8")) if "sizes" in row and not row["interpreted"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no benchmark file ({error}); expected what experiments.benchmark --output or "
                "dsa_jax.benchmarks.gpu_check writes."
            ) from error
    return [row for row in rows if row["op"] == "dense_attention" or not row["implementation"].startswith("peer:")]


def _parse(text: str) -> list[dict[str, Any]]:
    try:
        whole = json.loads(text)
    except ValueError:
        return [dict(json.loads(line)) for line in text.splitlines() if line.strip()]
    if "items" in whole:
        return [entry["row"] for entry in whole["items"] if entry["status"] == "timed"]
    return [dict(whole)]


def measured_tables(config: ModelConfig, rows: Sequence[Row], dollars_per_hour: float) -> dict[str, Any]:
    """Dollars per million tokens of attention alone, by position, phase and attention, as JSON values.

    An op that grows with the context is interpolated linearly between its measured lengths, never beyond them; attention to a
    selection reads topk keys whatever the length, and keeps the time of its nearest measured one. Of several implementations,
    dtypes and batch sizes, the fastest at the longest context counts; `measured` says which.

    Args:
        config: the model, whose geometry the rows must have.
        rows: of `read_rows`, of one device.
        dollars_per_hour: rent of that device.

    Raises:
        ConfigError: naming every op that is not measured as needed, or the devices where there are several.
    """
    require_indexer(config)
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        raise ConfigError(f"the benchmark rows are of {', '.join(devices)}; expected one device. Give its files only.")
    chosen = {key: [(part, _choose(rows, part, key[0])) for part in parts] for key, parts in attention_parts(config).items()}
    lacking = [_describe_lack(rows, part, key) for key, pairs in chosen.items() for part, series in pairs if series is None]
    if lacking:
        raise ConfigError(
            "the benchmark rows do not make the curves:\n  " + "\n  ".join(dict.fromkeys(lacking)) + "\nMeasure them with "
            "python -m experiments.benchmark --op=OP --output=FILE; its shapes are in dsa_jax/benchmarks/op_shapes.py."
        )
    growing = [series.lengths for pairs in chosen.values() for part, series in pairs if part.grows and series is not None]
    first, last = max(lengths[0] for lengths in growing), min(lengths[-1] for lengths in growing)
    if first >= last:
        raise ConfigError(
            f"no range of lengths is measured for every op: one starts at {first:,} keys, another ends at {last:,}. Measure "
            "them at common lengths."
        )
    positions = [round(x) for x in np.linspace(first, last, N_POINTS + 1)]
    per_second = 1e6 * dollars_per_hour / 3600.0

    def dollars(key: tuple[str, str]) -> list[float]:
        total = np.zeros(len(positions))
        for part, series in chosen[key]:
            assert series is not None
            total += part.n_layers * np.interp(positions, series.lengths, series.seconds)
        return [float(x) for x in total * per_second]

    curves = {phase: {attention: dollars((phase, attention)) for attention in ATTENTIONS} for phase in PHASES}
    return {
        "positions": positions,
        "dollars_per_million_tokens": curves,
        "pays_from": {phase: pays_from(curves[phase]["dense"], curves[phase]["sparse"], positions) for phase in PHASES},
        "measured": {
            "device": devices[0],
            "rows": {
                ", ".join(key): [series._asdict() for _, series in pairs if series is not None] for key, pairs in chosen.items()
            },
        },
    }


def _fitting(rows: Sequence[Row], part: Part, phase: str) -> list[Series]:
    """All series of a part, one for each way it was measured."""
    groups: dict[tuple[str, str, str, int], dict[int, float]] = {}
    for row in rows:
        sizes = row["sizes"]
        # A decode kernel takes one query of each of many sequences as the queries of one pool.
        one_each = sizes["queries"] == 1 or row["op"].startswith("decode")
        if (
            row["op"] in part.ops
            and one_each == (phase == "decode")
            and sizes["selection"] == "random"
            and all(sizes[name] == value for name, value in part.sizes.items())
        ):
            queries = sizes["batch"] * sizes["queries"]
            key = row["op"], row["implementation"], row["dtype"], queries
            groups.setdefault(key, {})[sizes["keys"]] = row["seconds"] / queries
    return [
        Series(*key, tuple(sorted(times)), tuple(seconds for _, seconds in sorted(times.items())))
        for key, times in groups.items()
    ]


def _choose(rows: Sequence[Row], part: Part, phase: str) -> Series | None:
    usable = [series for series in _fitting(rows, part, phase) if not part.grows or len(series.lengths) > 1]
    return min(usable, key=lambda series: (-series.lengths[-1], series.seconds[-1]), default=None)


def _describe_lack(rows: Sequence[Row], part: Part, key: tuple[str, str]) -> str:
    phase, attention = key
    sizes = ", ".join(f"{name} {value}" for name, value in part.sizes.items() if value is not None)
    lengths = sorted({length for series in _fitting(rows, part, phase) for length in series.lengths})
    found = f"measured at {', '.join(f'{n:,}' for n in lengths)} keys only" if lengths else "not measured"
    wanted = "; expected at least two lengths, measured the same way" if part.grows else ""
    form = "one query of each sequence" if phase == "decode" else "many queries of one sequence"
    return f"{phase}, {attention}: {' or '.join(part.ops)} ({form}; {sizes}) is {found}{wanted}."
