"""Weak scaling: FLOPs and bytes moved per device as devices and rows grow together, of compiled programs, not timed."""

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsa_jax.config import AXES, Config, ParallelConfig
from dsa_jax.dryrun.compiling import DecodeShape, compile_step, emulated_mesh
from dsa_jax.parallel.check import check_layout


class Rung(NamedTuple):
    """One layout of a ladder; numbers are per device and step.

    Fields: `preset` the ladder; `sizes` of the mesh axes with several devices; `flops` as `matmul_flops` counts them; `moved`
    bytes by kind of collective.
    """

    preset: str
    sizes: dict[str, int]
    flops: int
    moved: dict[str, int]

    @property
    def n_devices(self) -> int:
        """Devices of the layout."""
        return math.prod(self.sizes.values())


def rungs(preset: str) -> Iterator[dict[str, int]]:
    """Sizes of the axes from one device up to `preset`: the first axis that is not full yet doubles, or is filled."""
    full = ParallelConfig(preset=preset).sizes()
    sizes = dict.fromkeys(AXES, 1)
    yield dict(sizes)
    for axis in AXES:
        while sizes[axis] < full[axis]:
            sizes[axis] = min(2 * sizes[axis], full[axis])
            if full[axis] % sizes[axis]:
                sizes[axis] = full[axis]
            yield dict(sizes)


def weak_scaling(config: Config, presets: Sequence[str], step: str, shape: DecodeShape) -> list[Rung]:
    """Compile `step` on emulated devices for every rung of every preset, with as many rows per device as the recipe has in all.

    Args:
        config: the recipe; the batch sizes of its stages, and of `shape`, are those of one device.
        presets: layouts to climb to.
        step: a stage, or "decode".
        shape: of the decode step.

    Raises:
        ConfigError: for a layout that does not fit the model, or more devices than there are.
    """
    results: list[Rung] = []
    seen: dict[tuple[int, ...], Rung] = {}
    for preset in presets:
        for sizes in rungs(preset):
            key = tuple(sizes.values())
            if key not in seen:
                seen[key] = _measure(config, preset, sizes, step, shape)
            results.append(seen[key]._replace(preset=preset))
    return results


def _measure(config: Config, preset: str, sizes: dict[str, int], step: str, shape: DecodeShape) -> Rung:
    config, n = copy.deepcopy(config), math.prod(sizes.values())
    config.parallel = ParallelConfig("single", **sizes)
    config.eval.batch_size *= n
    for stage in (config.train.pretrain, config.train.warmup, config.train.sparse):
        stage.batch_size *= n
    check_layout(config)
    compiled = compile_step(config, step, emulated_mesh(config), shape._replace(rows=shape.rows * n))
    moved: Counter[str] = Counter()
    for each in compiled.collectives:
        moved[each.kind] += each.bytes
    return Rung(preset, {axis: size for axis, size in sizes.items() if size > 1}, compiled.flops, dict(moved))


def format_weak_scaling(step: str, ladder: Sequence[Rung]) -> str:
    """A Markdown table; `growth` is FLOPs per device over those of one device, 1.00 where no work is repeated."""
    lines = [
        f"| {step}: preset | devices | layout | MFLOP per device | growth | MB moved per device | by kind |",
        "|---|---|---|---|---|---|---|",
    ]
    alone = {rung.preset: rung.flops for rung in ladder if rung.n_devices == 1}
    for rung in ladder:
        layout = " x ".join(f"{axis} {size}" for axis, size in rung.sizes.items()) or "one device"
        kinds = ", ".join(f"{kind} {size / 1e6:.3f}" for kind, size in sorted(rung.moved.items(), key=lambda kv: -kv[1]))
        lines.append(
            f"| {rung.preset} | {rung.n_devices} | {layout} | {rung.flops / 1e6:.1f} | {rung.flops / alone[rung.preset]:.2f} | "
            f"{sum(rung.moved.values()) / 1e6:.3f} | {kinds or 'none'} |"
        )
    return "\n".join(lines)
