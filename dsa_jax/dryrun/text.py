"""What a dry run prints."""

from typing import Any

from dsa_jax.dryrun.compiling import CompiledStep
from dsa_jax.params import BLOCK_SCALES

GB = 1e9


def format_summary(summary: dict[str, Any], device_bytes: float) -> str:
    """The summary as aligned text; `device_bytes` is the memory that each device has."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in summary["mesh"].items()) or "one device"
    lines = [f"{summary['name']} on {mesh}; nothing is allocated", "", *_parameters(summary["parameters"])]
    lines += ["", f"{'GFLOP per token, mean over the sequence':44}{'forward':>12}{'training':>12}"]
    for length, flops in summary["flops_per_token"].items():
        for mode in flops["forward"]:
            cells = "".join(f"{flops[phase][mode] / 1e9:12,.1f}" for phase in ("forward", "training"))
            lines.append(f"  {f'{mode}, {length:,} tokens':42}{cells}")
    lines += ["", f"{'cache, bytes per token':44}{'dense':>12}{'sparse':>12}"]
    for dtype, sizes in summary["cache_bytes_per_token"].items():
        lines.append(f"  {dtype:42}" + "".join(f"{size:12,.0f}" for size in sizes.values()))
    lines += ["", *_memory(summary, device_bytes), "", *_sharding(summary["sharding"])]
    return "\n".join(lines)


def format_compiled(result: CompiledStep, device_bytes: float) -> str:
    """The compiler's memory and the collectives of one step."""
    fits = "fits in" if result.peak <= device_bytes else "DOES NOT FIT in"
    lines = [
        f"{result.step} step compiled for {result.platform} in {result.seconds:.0f} s; the compiler's GB per device",
        f"  {'arguments':42}{result.arguments / GB:12.2f}",
        f"  {'outputs that reuse no argument':42}{(result.outputs - result.aliased) / GB:12.2f}",
        f"  {'temporaries':42}{result.temporaries / GB:12.2f}",
        f"  {'together':42}{result.peak / GB:12.2f}  {fits} {device_bytes / GB:g} GB",
        "",
    ]
    if not result.collectives:
        return "\n".join([*lines, "collectives per step: none"])
    lines.append(f"{'collectives per step and device':27}{'group':>7}{'times':>9}{'GB':>12}  shape")
    for each in result.collectives:
        lines.append(f"  {each.kind:25}{each.group or '-':>7}{each.times:9,}{each.bytes / GB:12.4f}  {_shortened(each.shape)}")
    total = sum(each.bytes for each in result.collectives)
    times = sum(each.times for each in result.collectives)
    return "\n".join([*lines, f"  {'all':25}{'':7}{times:9,}{total / GB:12.4f}"])


def _parameters(numbers: dict[str, Any]) -> list[str]:
    row = lambda name, n: f"{name:38}{n:18,}"
    lines = [row("parameters", numbers["total"]), row("  of them in indexers", numbers["indexers"])]
    lines.append(row("  active: a token multiplies with", numbers["active"]))
    return lines + [row(f"  trainable in {stage}", n) for stage, n in numbers["trainable"].items()]


def _memory(summary: dict[str, Any], device_bytes: float) -> list[str]:
    parameters = summary["parameter_bytes"]
    if not summary["stages"]:
        serves = any(row["path"].endswith(BLOCK_SCALES) for row in summary["sharding"])
        how = " and --config.model.weight_format=plain" if serves else ""
        return [
            f"{'GB per device':44}",
            f"  {'parameters':42}{parameters / GB:12.2f}",
            f"  no stage has steps: set --config.train.sparse.steps=1, its batch_size and seq_len{how} to see a training step",
        ]
    columns = summary["stages"].values()
    row = lambda name, values: f"  {name:42}" + "".join(f"{value / GB:12.2f}" for value in values)
    lines = [
        f"{'GB per device':44}" + "".join(f"{name:>12}" for name in summary["stages"]),
        f"  {'rows x tokens of a micro-batch, all devices':42}"
        + "".join(f"{'{} x {}'.format(stage['rows'], stage['seq_len']):>12}" for stage in columns),
        row("parameters", [parameters] * len(columns)),
        row("optimizer state", [stage["optimizer"] for stage in columns]),
        row("gradients", [stage["gradients"] for stage in columns]),
        row("saved by all layers for the backward pass", [stage["activations"]["saved"] for stage in columns]),
        row("backward pass of the costliest layer", [stage["activations"]["layer"] for stage in columns]),
        row("its weights gathered, and their gradient", [stage["activations"]["weights"] for stage in columns]),
        row("or: a chunk of logits", [stage["activations"]["logits"] for stage in columns]),
        row("together, an estimate", [stage["total"] for stage in columns]),
    ]
    too_big = [name for name, stage in summary["stages"].items() if stage["total"] > device_bytes]
    verdict = f"DOES NOT FIT: {', '.join(too_big)}" if too_big else "fits"
    return [*lines, f"  in {device_bytes / GB:g} GB: {verdict}", *_HOW]


_HOW = (
    "  What is saved and what one layer holds are estimates: jax.vjp of one layer, traced, says what it keeps for its backward",
    "  pass, under the recipe's model.remat (times layers) and without it (one layer). Results that the compiler fuses are",
    "  counted; what an operation holds while it runs, and what a frozen layer computes on the way, is not. --compile or",
    "  --target asks the compiler instead.",
)


def _sharding(rows: list[dict[str, Any]]) -> list[str]:
    width = max(len(row["path"]) for row in rows)
    lines = [f"{'parameter':{width}}  {'shape':>22}  {'dtype':13}  {'split over':30}  {'MB per device':>13}"]
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        spec = ", ".join(axis or "-" for axis in row["spec"]) if any(row["spec"]) else "all have it"
        lines.append(f"{row['path']:{width}}  {shape:>22}  {row['dtype']:13}  {spec:30}  {row['bytes'] / 1e6:13,.1f}")
    return lines


def _shortened(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 4] + " ..."
