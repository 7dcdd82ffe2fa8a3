"""The verdict of a parity table in sentences: what was compared, what sparse attention keeps and saves, what is doubtful."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

LOSS_ALLOWANCE = 0.02
"""Nats per token by which sparse may be worse than dense and still counts as keeping what dense has."""
ACCURACY_ALLOWANCE = 0.02
"""Share of answers, likewise."""
_LOW_COVERAGE = 0.8
_TITLES = {"recall_accuracy": "recall"}


class Verdict(NamedTuple):
    """Sentences for readers; `savings` is empty where nothing says it, `doubts` where there is none."""

    quality: str
    savings: str
    doubts: tuple[str, ...]

    def lines(self) -> list[str]:
        """All sentences, one per line; doubts are marked as such."""
        return [line for line in (self.quality, self.savings, *(f"Doubtful: {doubt}" for doubt in self.doubts)) if line]


class _Measure(NamedTuple):
    """One quality of dense and sparse; `loss` is how much worse sparse is, `error` its standard error, None where unknown."""

    name: str
    text: str
    loss: float
    allowance: float
    error: float | None


def verdict(report: Mapping[str, Any]) -> Verdict:
    """The verdict on a report of plain JSON values (see `report.write_report`), from its rows `dense` and `sparse`."""
    rows = {row["name"]: row for row in report["rows"]}
    if not {"dense", "sparse"} <= rows.keys():
        return Verdict("The rows dense and sparse were not both evaluated; the table shows what was.", "", ())
    dense, sparse = rows["dense"], rows["sparse"]
    measures = list(_measures(dense, sparse))
    lost = [measure.name for measure in measures if measure.loss > measure.allowance]
    shown = "; ".join(measure.text for measure in measures)
    if not measures:
        quality = "Nothing was measured for dense and sparse."
    elif lost:
        quality = f"Sparse attention loses on {_listed(lost)}, on the same weights: {shown}."
    else:
        quality = f"Sparse attention keeps what dense attention has, on the same weights: {shown}."
    return Verdict(quality, _savings(dense, sparse, report.get("costs")), tuple(_doubts(rows, measures, report)))


def about(report: Mapping[str, Any]) -> str:
    """What a report is of, in one sentence: checkpoint, text, budget, indexer, rows and lengths; empty without `setup`."""
    setup = report.get("setup")
    if not setup:
        return ""
    parts = [str(setup["checkpoint"])] if setup.get("checkpoint") else []
    if text := setup.get("text"):
        parts.append(f"text {text['source']} (tokenizer {text['tokenizer']})")
    if indexer := setup.get("indexer"):
        parts.append(f"topk {_listed([str(topk) for topk in setup['topk']])}")
        parts.append(f"indexer of {indexer['n_heads']} heads x {indexer['head_dim']}")
    else:
        parts.append("no indexer")
    lengths: dict[tuple[str, int], list[str]] = {}
    for name, (n_rows, length) in setup["sizes"].items():
        lengths.setdefault((name.partition("@")[0], n_rows), []).append(str(length))
    sizes = [f"{name} {n_rows} rows of {_listed(each)} tokens" for (name, n_rows), each in lengths.items()]
    return f"Evaluated: {', '.join(parts)}; {', '.join(sizes)}."


def _measures(dense: Mapping[str, Any], sparse: Mapping[str, Any]) -> Iterator[_Measure]:
    before, after = dense.get("text_loss"), sparse.get("text_loss")
    if before is not None and after is not None:
        change, error = after - before, (sparse.get("text_loss_difference") or {}).get("standard_error")
        bound = f" ± {error:.3f}" if error is not None else ""
        text = f"text loss {after:.3f} instead of {before:.3f} nats per token ({change:+.3f}{bound})"
        yield _Measure("text", text, change, LOSS_ALLOWANCE, error)
    for name, before, after, error in _accuracies(dense, sparse):
        bound = f" (± {error:.1%})" if error is not None else ""
        yield _Measure(name, f"{name} {after:.1%} instead of {before:.1%}{bound}", before - after, ACCURACY_ALLOWANCE, error)


def _accuracies(dense: Mapping[str, Any], sparse: Mapping[str, Any]) -> Iterator[tuple[str, float, float, float | None]]:
    """(name, of dense, of sparse, standard error of the difference) of recall and of every task at every length."""
    for key, title in _TITLES.items():
        if dense.get(key) is not None and sparse.get(key) is not None:
            yield title, dense[key], sparse[key], None
    for name, result in (sparse.get("tasks") or {}).items():
        theirs = (dense.get("tasks") or {}).get(name)
        if theirs is None:
            continue
        if "by_length" not in result:
            yield name, theirs["accuracy"], result["accuracy"], None
        for length, entry in (result.get("by_length") or {}).items():
            before, error = theirs["by_length"][length]["accuracy"], (entry.get("difference") or {}).get("standard_error")
            if before is not None and entry["accuracy"] is not None:
                yield f"{name} at {length} tokens", before, entry["accuracy"], error


def _savings(dense: Mapping[str, Any], sparse: Mapping[str, Any], costs: Mapping[str, Any] | None) -> str:
    parts = []
    if sparse.get("keys_per_query") and dense.get("keys_per_query"):
        parts.append(f"reads {sparse['keys_per_query']:.1f} keys per query instead of {dense['keys_per_query']:.1f}")
    if costs:
        before, after = costs["dense_flops"][0] / 1e9, costs["sparse_flops"][0] / 1e9
        parts.append(
            f"computes {after:.2f} GFLOP per token instead of {before:.2f} in a sequence of {costs['lengths'][0]} "
            f"({after / before - 1:+.0%}, by formula)"
        )
        start, longest = costs["pays_from"], costs["lengths"][-1]
        parts.append(f"computes less from {start} tokens on" if start else f"never computes less up to {longest} tokens")
    return f"It {_listed(parts)}." if parts else ""


def _doubts(rows: Mapping[str, Mapping[str, Any]], measures: Sequence[_Measure], report: Mapping[str, Any]) -> Iterator[str]:
    dense, sparse = rows["dense"], rows["sparse"]
    if sparse.get("keys_per_query") and sparse["keys_per_query"] == dense.get("keys_per_query"):
        yield "sparse read every key that dense read, so that both are the same: evaluate longer rows, or lower topk."
    unclear = [m.name for m in measures if m.error is not None and m.loss > m.allowance and m.loss < 2 * m.error]
    if unclear:
        yield f"the difference on {_listed(unclear)} is less than two standard errors: evaluate more rows."
    wide = [m.name for m in measures if m.error is not None and m.loss <= m.allowance < 2 * m.error]
    if wide:
        yield f"the standard error on {_listed(wide)} is too wide to rule out a loss: evaluate more rows."
    unable = [name for name, before, _, _ in _accuracies(dense, sparse) if before < 0.5]
    if unable:
        yield f"dense attention itself answers less than half of {_listed(unable)}, which therefore says little."
    coverage = [value for value in (report.get("coverage_by_layer") or {}).get("sparse") or () if value is not None]
    if coverage and min(coverage) < _LOW_COVERAGE:
        layer = coverage.index(min(coverage))
        low = sum(value < _LOW_COVERAGE for value in coverage)
        yield (
            f"{low} of {len(coverage)} layers hold less than {_LOW_COVERAGE:.0%} of the attention (layer {layer}: "
            f"{coverage[layer]:.1%}): warm up longer, raise topk, or keep these layers dense."
        )
    for name in ("sparse, untrained indexer", "window of the same budget"):
        others = list(_measures(dense, rows[name])) if name in rows else []
        if others and all(other.loss <= other.allowance for other in others):
            yield f"{name} keeps it as well, so that these measures do not need a trained selection."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
