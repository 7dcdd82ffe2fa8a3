"""Checks an op at named shapes on this device, then times it; a wrong one gets no time."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax

from dsa_jax.benchmarks import op_checks, peers, timing
from dsa_jax.benchmarks.op_calls import IMPLEMENTATIONS, make_call, make_inputs, timed_call
from dsa_jax.benchmarks.op_shapes import INTERPRETED, SHAPES
from dsa_jax.costs.ops import OpShape, floor_seconds, op_cost
from pallas_kernels import tuning
from pallas_kernels.tuning import AnyTiles

Row = dict[str, Any]


def run(
    op: str,
    shapes: Sequence[str] = (),
    implementations: Sequence[str] = (),
    *,
    with_peers: bool = False,
    small: bool = False,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Checks, then measures, every given shape with every given implementation.

    Args:
        op: a key of `SHAPES`.
        shapes: names out of `SHAPES[op]`; none: "laptop" on CPU, all others on a GPU.
        implementations: none: "reference" and "xla" on CPU, all but "reference" on a GPU, leaving out what is not there.
        with_peers: measure other libraries' kernels after ours, at each shape, where they are installed.
        small: check at the sizes for interpreted kernels, and time two repeats.
        report: receives one line per row, and the reason for each that is left out.

    Returns:
        The rows of `measure`; of a peer without `tiles`, and of one that is wrong only {op, shape, implementation, wrong}.

    Raises:
        ValueError: an op, shape or implementation that does not exist.
        NotImplementedError: a given implementation does not cover the call.
        CheckError: a result was wrong; nothing is returned, then.
    """
    require_known("op", [op], SHAPES)
    on_gpu = jax.default_backend() == "gpu"
    names = list(shapes) or [name for name in SHAPES[op] if (name != "laptop") == on_gpu]
    on_device = [name for name in IMPLEMENTATIONS[op] if name != "reference"] if on_gpu else ["reference", "xla"]
    require_known(f"{op}: shape", names, SHAPES[op])
    require_known(f"{op}: implementation", implementations, IMPLEMENTATIONS[op])
    rows: list[Row] = []
    report(format_header())
    others = peers.of_op(op, report=report) if with_peers else []
    for name in names:
        for implementation in implementations or on_device:
            try:
                op_checks.check_reduced(op, SHAPES[op][name], implementation, small=small)
            except NotImplementedError as error:
                if implementations:
                    raise
                report(f"{op}, {name}, {implementation} left out: {error}")
                continue
            rows.append(measure(op, name, SHAPES[op][name], implementation, repeats=2 if small else 20))
            report(format_row(rows[-1]))
        for peer in others:
            found = peers.run(op, name, SHAPES[op][name], peer, repeats=2 if small else 20, report=report)
            if isinstance(found, timing.Timing):
                rows.append(_row(op, name, SHAPES[op][name], peer.label(), found))
                report(format_row(rows[-1]))
            elif found is not None:
                rows.append({"op": op, "shape": name, "implementation": peer.label(), **found})
    return rows


def require_known(what: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raises ValueError for the first of `given` that is not in `known`; `what` it names, for the message."""
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(f"{what} is {unknown[0]!r}; expected one of {', '.join(known) or 'none: this op has no kernels'}.")


class Item(NamedTuple):
    """A check or a measurement of an op at a named shape.

    Fields: `kind` "check_reduced", "check_real", "time", "check_and_time" or "kernels"; `small` on CPU, at the shape of
    interpreted kernels; `tiles` to run with by kernel, others at their default.
    """

    kind: str
    op: str
    shape: str
    implementation: str
    small: bool = False
    tiles: tuple[tuple[str, AnyTiles], ...] = ()

    @property
    def sizes(self) -> OpShape:
        """Shape of the call."""
        return INTERPRETED if self.small else SHAPES[self.op][self.shape]


def perform(item: Item) -> dict[str, Any]:
    """Does one item in this process.

    Returns:
        "check_reduced" and "check_real": {status: "passed", compared}; "time", and "check_and_time", which checks at reduced
        sizes first: {status: "timed", row}; both with the `tiles` of their kernels as `tiles_of` gives them. "kernels":
        {status: "found", kernels: [(kernel, shape, default tiles), ...]}, in the order in which they are traced.

    Raises:
        CheckError: the result is wrong.
        NotImplementedError: the implementation does not cover the call.
    """
    op, shape, implementation = item.op, item.sizes, item.implementation
    if item.tiles or item.kind == "kernels":
        jax.clear_caches()  # a program that was traced with other tiles must not be found again
    with tuning.trial(dict(item.tiles)), tuning.recorded() as choices:
        if item.kind == "kernels":
            arrays = jax.eval_shape(lambda: make_inputs(op, shape))
            jax.eval_shape(make_call(op, shape, implementation), **arrays)
            return {"status": "found", "kernels": [(x.kernel, dict(x.shape), x.default) for x in choices]}
        result: dict[str, Any] = {"status": "passed"}
        if item.kind == "check_real":
            result["compared"] = op_checks.check_real(op, shape, implementation)
        elif item.kind != "time":
            result["compared"] = op_checks.check_reduced(op, shape, implementation, small=item.small)
        if item.kind in ("time", "check_and_time"):
            repeats = 2 if item.small else 20
            result = {"status": "timed", "row": measure(op, item.shape, shape, implementation, repeats=repeats)}
    return {**result, "tiles": tiles_of(choices)} if choices else result


def measure(op: str, name: str, shape: OpShape, implementation: str, *, repeats: int = 20) -> Row:
    """Times `op`, without any check.

    Args:
        name: of the shape, for the row.
        repeats: fewer are made of a call that takes over a second.

    Returns:
        {op, shape, sizes, dtype, implementation, interpreted, device, seconds, p10, p90, repeats, timing, flops, bytes,
        tflops_per_second, terabytes_per_second, floor_seconds, share_of_floor, tiles}: `seconds` is the median; floor and share
        are None on devices whose peaks are not known; `tiles` are the block sizes of each kernel, and where they come from.
    """
    arrays = make_inputs(op, shape)
    function, given = timed_call(op, shape, implementation, arrays)
    with tuning.recorded() as choices:
        timed = timing.measure(function, given, repeats=repeats)
    return {**_row(op, name, shape, implementation, timed), "tiles": tiles_of(choices)}


def tiles_of(choices: Sequence[tuning.Choice]) -> list[dict[str, Any]]:
    """The block sizes of each kernel that ran, {kernel, source, ...}: `source` is "table", "default" or "trial"."""
    found = [{"kernel": x.kernel, "source": x.source, **dataclasses.asdict(x.tiles)} for x in choices]
    return list({str(x): x for x in found}.values())


def _row(op: str, name: str, shape: OpShape, implementation: str, timed: timing.Timing) -> Row:
    device = jax.devices()[0].device_kind
    needed, floor = op_cost(op, shape), floor_seconds(op, shape, device)
    return {
        "op": op,
        "shape": name,
        "sizes": shape._asdict(),
        "dtype": shape.dtype,
        "implementation": implementation,
        "interpreted": implementation.startswith("pallas") and jax.default_backend() == "cpu",
        "device": device,
        **timed._asdict(),
        "flops": needed.flops,
        "bytes": needed.bytes,
        "tflops_per_second": needed.flops / timed.seconds / 1e12,
        "terabytes_per_second": needed.bytes / timed.seconds / 1e12,
        "floor_seconds": floor,
        "share_of_floor": None if floor is None else floor / timed.seconds,
    }


def format_header() -> str:
    """The heading over lines of `format_row`."""
    return (
        f"{'op':26} {'shape':24} {'implementation':24} {'ms':>10} {'p10':>10} {'p90':>10} {'TFLOP/s':>9} {'TB/s':>8} "
        f"{'floor':>7}  timing"
    )


def format_row(row: Row) -> str:
    """One row as aligned text, times in milliseconds."""
    times = " ".join(f"{row[name] * 1e3:10.3f}" for name in ("seconds", "p10", "p90"))
    share = "-" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"
    note = ", interpreted" if row["interpreted"] else ""
    return (
        f"{row['op']:26} {row['shape']:24} {row['implementation']:24} {times} {row['tflops_per_second']:9.3f} "
        f"{row['terabytes_per_second']:8.4f} {share:>7}  {row['timing']}{note}"
    )
