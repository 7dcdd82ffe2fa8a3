"""Verdict on a recipe before anything is bought: on which GPUs it fits, hours, dollars, and where sparse attention pays.

All of it follows from shapes, so that a Hugging Face directory needs no more than its config.json. Bytes are those of
`summarize`; FLOPs are the model's, by formula, without what rematerialisation computes twice, as MFU counts them.
"""

import copy
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsa_jax.config import STAGES as STAGE_ORDER
from dsa_jax.config import Config, ConfigError, ParallelConfig, StageConfig
from dsa_jax.config.selections import is_by_indexer
from dsa_jax.costs.indexer_size import pays_from_length
from dsa_jax.costs.model import training_flops_per_token, warmup_flops_per_token
from dsa_jax.costs.ops import peaks_of
from dsa_jax.dryrun.summary import GB, summarize
from dsa_jax.train.stages import stage_of

_H100 = peaks_of("H100")
_DATA_SHEET_FLOAT32 = 67.0
_PARTS = ("parameters", "gradients", "optimizer", "activations")


class Machine(NamedTuple):
    """`n_gpus` GPUs with `gigabytes` (1e9 bytes) of memory each."""

    n_gpus: int
    gigabytes: float

    @property
    def words(self) -> str:
        """As people say it."""
        return f"{self.n_gpus} GPU{'s' if self.n_gpus > 1 else ''} of {self.gigabytes:g} GB"


class Assumed(NamedTuple):
    """What the hours and dollars assume; `peak_tflops` None: of an H100 in the dtype that the model computes in."""

    mfu: float = 0.35
    dollars_per_gpu_hour: float = 2.50
    peak_tflops: float | None = None

    def peak_of(self, dtype: str) -> float:
        """TFLOP/s of one GPU that `mfu` is a share of: in bfloat16 that of the MFU in a run's log."""
        assert _H100 is not None
        return self.peak_tflops or (_H100.flops / 1e12 if dtype == "bfloat16" else _DATA_SHEET_FLOAT32)


def parse_machine(text: str) -> Machine:
    """`NxGB`, such as 8x80.

    Raises:
        ConfigError: for another form.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([0-9]{1,5}(?:\.[0-9]{1,9})?)", text)
    if not match or float(match[2]) == 0.0:
        raise ConfigError(f"--gpus has {text!r}; expected their number and the memory of one in GB, such as 8x80.")
    return Machine(int(match[1]), float(match[2]))


def judge(config: Config, machines: Sequence[Machine], assumed: Assumed) -> dict[str, Any]:
    """The verdict on a resolved, validated recipe as JSON values.

    Returns:
        `machines`: by words, the `layout`, and either `error`, why it cannot be split so, or `stages` with bytes per GPU
        (`parameters`, `gradients`, `optimizer`, `activations`, `total`) and `fits`; `stages`: `tokens`, `flops` and
        `gpu_hours` and `dollars` of each, None where its attention has no formula; `pays_from` tokens, None: never, or no
        indexer; `assumed`.
    """
    stages = {name: stage for name in STAGE_ORDER if (stage := getattr(config.train, name)).n_steps}
    peak = assumed.peak_of(config.model.dtype)
    return {
        "machines": {machine.words: _on_machine(config, machine) for machine in machines} if stages else {},
        "stages": {name: _work(config, name, stage, peak * 1e12 * assumed.mfu, assumed) for name, stage in stages.items()},
        "pays_from": pays_from_length(config.model) if config.model.attention.indexer.enabled else None,
        "assumed": {**assumed._asdict(), "peak_tflops": peak, "dtype": config.model.dtype},
    }


def laid_out_on(config: Config, n_gpus: int) -> Config:
    """The recipe on so many GPUs: in its own layout where that has as many, else with rows and parameters split by fsdp.

    In another layout than its own the recipe's micro-batches are those of one row per GPU.
    """
    config = copy.deepcopy(config)
    if math.prod(config.parallel.sizes().values()) != n_gpus:
        config.parallel = ParallelConfig("single" if n_gpus == 1 else f"fsdp{n_gpus}")
        config.eval.batch_size = 0
        for name in STAGE_ORDER:
            getattr(config.train, name).accumulation = 0
    return config.laid_out()


def _on_machine(config: Config, machine: Machine) -> dict[str, Any]:
    config = laid_out_on(config, machine.n_gpus)
    layout = " x ".join(f"{axis} {size}" for axis, size in config.parallel.sizes().items() if size > 1) or "one device"
    try:
        summary = summarize(config)
    except ConfigError as error:
        return {"layout": layout, "error": str(error)}
    stages = {}
    for name, stage in summary["stages"].items():
        activations = stage["activations"]["total"]
        needed = dict(
            zip(_PARTS, (summary["parameter_bytes"], stage["gradients"], stage["optimizer"], activations), strict=True)
        )
        total = stage["total"]
        stages[name] = {
            **needed,
            "total": total,
            "fits": total <= machine.gigabytes * GB,
            "accumulation": stage["accumulation"],
        }
    return {"layout": layout, "stages": stages}


def _work(config: Config, name: str, stage: StageConfig, flops_per_second: float, assumed: Assumed) -> dict[str, Any]:
    """Tokens, FLOPs, GPU-hours and dollars of a stage, with every phase of its curriculum at its own length."""
    ends = [*(min(until, stage.n_steps) for until, _ in stage.curriculum), stage.n_steps]
    lengths = [*(length for _, length in stage.curriculum), stage.seq_len]
    tokens = flops = 0.0
    for begin, end, length in zip([0, *ends], ends, lengths, strict=False):
        n = (end - begin) * stage.batch_size * length
        tokens += n
        flops += n * (_flops_per_token(config, name, length) or math.nan)
    if math.isnan(flops):
        return {"tokens": int(tokens), "flops": None, "gpu_hours": None, "dollars": None}
    hours = flops / flops_per_second / 3600.0
    return {"tokens": int(tokens), "flops": flops, "gpu_hours": hours, "dollars": hours * assumed.dollars_per_gpu_hour}


def _flops_per_token(config: Config, name: str, length: int) -> float | None:
    """Training FLOPs of a token in a stage; None under an attention that has no formula."""
    attention = stage_of(config, name).attention
    if name == "warmup":
        return warmup_flops_per_token(config.model, length)
    if attention not in ("dense", "sparse") or (is_by_indexer(attention) and not config.model.attention.indexer.enabled):
        return None
    return training_flops_per_token(config.model, length, attention)


def format_verdict(verdict: dict[str, Any], config: Config) -> str:
    """The verdict in lines, with what it assumes."""
    assumed, stages = verdict["assumed"], verdict["stages"]
    lines = ["verdict, by formula from shapes; nothing is measured"]
    for words, found in verdict["machines"].items():
        lines += _machine_lines(words, found)
    n_gpus = [int(words.split()[0]) for words in verdict["machines"]]
    for name, stage in stages.items():
        lines.append(f"  {name}: {stage['tokens'] / 1e9:.3f}e9 tokens, {_cost(stage, n_gpus)}")
    priced = [stage for stage in stages.values() if stage["gpu_hours"] is not None]
    if len(priced) == len(stages) > 1:
        both = {key: sum(stage[key] for stage in priced) for key in ("gpu_hours", "dollars")}
        lines.append(f"  all stages: {_cost(both, n_gpus)}")
    if stages:
        lines.append(
            f"  assumed: mfu={assumed['mfu']:g} of peak_tflops={assumed['peak_tflops']:g} ({assumed['dtype']}), "
            f"dollars_per_gpu_hour={assumed['dollars_per_gpu_hour']:.2f}; evaluation is not counted"
        )
    if (indexer := config.model.attention.indexer).enabled:
        size = f"{indexer.n_heads} index heads of {indexer.head_dim}, topk {indexer.topk}"
        start = verdict["pays_from"]
        pays = f"pays from {start:,} tokens on" if start else "never pays"
        lines.append(f"  sparse attention {pays}: fewer FLOPs per token than dense, forward, with {size}")
        if start and start > config.model.max_positions:
            lines.append(f"  the model has {config.model.max_positions:,} positions, fewer than that")
    return "\n".join(lines)


def _machine_lines(words: str, found: dict[str, Any]) -> list[str]:
    where = f"  {words} ({found['layout']}): "
    if "error" in found:
        return [f"{where}cannot be split: {found['error']}"]
    misfits = [name for name, stage in found["stages"].items() if not stage["fits"]]
    lines = [where + (f"DOES NOT FIT: {', '.join(misfits)}" if misfits else "fits")]
    for name, stage in found["stages"].items():
        parts = ", ".join(f"{'moments' if part == 'optimizer' else part} {stage[part] / GB:.1f}" for part in _PARTS)
        fit = "fits" if stage["fits"] else "does not fit"
        cut = f"accumulation {stage['accumulation']}"
        lines.append(f"    {name} {fit}: {stage['total'] / GB:.1f} GB on each: {parts}; {cut}")
    return lines


def _cost(stage: dict[str, Any], n_gpus: Sequence[int]) -> str:
    if stage["gpu_hours"] is None:
        return "no formula for its attention"
    hours = ", ".join(f"{stage['gpu_hours'] / n:,.1f} hours on {n}" for n in n_gpus)
    return f"{stage['gpu_hours']:,.1f} GPU-hours ({hours}), {stage['dollars']:,.0f} dollars"
