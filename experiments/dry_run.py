r"""Needs of a recipe, with nothing allocated: parameters, FLOPs, cache, bytes per device, sharding, compiled memory.

    python -m experiments.dry_run --config=configs/retrofit_hf.py --config.init.hf_dir=DIR           # config.json is enough
    python -m experiments.dry_run --config=configs/h200x8_deepseek_v2_lite.py
    python -m experiments.dry_run --config=configs/h200x8_deepseek_v2_lite.py --compile              # emulated devices
    python -m experiments.dry_run --config=configs/h200x8_deepseek_v2_lite.py --target=h200x8        # GPUs that are not here
    python -m experiments.dry_run --config=configs/deepseek_v32.py --config.parallel.preset=ep8 --step=decode --target=h200x8

First comes a verdict: on which --gpus it fits, hours and dollars of its stages, and from which length sparse attention pays.
Without --compile or --target all of it follows from shapes, in seconds, for a model that computes on a GPU. Both compile the
real step of --step, which also tells the collectives: --compile for emulated CPU devices, whose memory is not a GPU's, --target
for the named GPUs, with the compiler of the extra `aot`.
"""

import math
import os

from absl import flags

from dsa_jax.config.limits import LENGTH, NAME, ROWS, Range, Text
from experiments.flags import ConfigFlag, run_main
from experiments.output import OutputFlag
from experiments.values import limited_flag, list_flag

_CONFIG = ConfigFlag()
_COMPILE = flags.DEFINE_boolean("compile", False, "Compile the step for the recipe's mesh on emulated CPU devices.")
_TARGET = limited_flag("target", "", str, NAME, "Compile the step for GPUs that need not be here: h200x1, h200x8.")
_WEAK_SCALING = list_flag(
    "weak_scaling", [], Text(200), "Presets to measure step by step, starting from one device; nothing else is printed."
)
_STEP = flags.DEFINE_enum(
    "step", "", ["", "pretrain", "warmup", "sparse", "decode"], "Step to compile; empty: the recipe's last stage."
)
_ROWS = limited_flag("rows", 1, int, ROWS, "decode: sequences.")
_CONTEXT = limited_flag("context", 32768, int, LENGTH, "decode: tokens that the cache of a sequence holds.")
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", "", ["", "float32", "bfloat16", "fp8"], "decode: that of the cache; empty: that of the activations."
)
_MEMORY = limited_flag(
    "device_gb", 141.0, float, Range(1.0, 1e6), "Memory of a device in GB (1e9 bytes), to say whether it fits."
)
_GPUS = list_flag("gpus", ["1x80", "8x80"], NAME, "Machines of the verdict: number of GPUs x memory of one in GB, 1e9 bytes.")
_MFU = limited_flag("mfu", 0.35, float, Range(1e-3, 1.0), "verdict: share of the peak that training is taken to reach.")
_PEAK = limited_flag(
    "peak_tflops",
    None,
    float,
    Range(1e-3, 1e6),
    "verdict: peak TFLOP/s of a GPU; empty: an H100's in the dtype of the matmuls.",
)
_PRICE = limited_flag("dollars_per_gpu_hour", 2.50, float, Range(0, 1e6), "verdict: rent of one GPU.")
_OUTPUT = OutputFlag("JSON file for everything that is printed; empty: none.")


def main(argv: list[str]) -> None:
    """Compute, print, compile if asked to."""
    del argv
    # Nothing here may take hold of an accelerator.
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from dsa_jax.checkpoints.from_hf import resolve_checkpoint
    from dsa_jax.config import STAGES, ParallelConfig
    from dsa_jax.dryrun import (
        Assumed,
        DecodeShape,
        compile_step,
        emulated_mesh,
        format_compiled,
        format_summary,
        format_verdict,
        format_weak_scaling,
        judge,
        parse_machine,
        summarize,
        target_mesh,
        weak_scaling,
    )

    _check_flags()
    machines = [parse_machine(text) for text in _GPUS.value]
    _OUTPUT.check()
    config = _CONFIG.checked
    if config.init.hf_dir:
        config = resolve_checkpoint(config, platform="gpu")
    config.validate()
    jax.config.update("jax_platforms", "cpu")
    layouts = [config.parallel, *(ParallelConfig(preset=preset) for preset in _WEAK_SCALING.value)]
    n_devices = max(math.prod(layout.sizes().values()) for layout in layouts)
    compiles_here = _COMPILE.value or _WEAK_SCALING.value
    if compiles_here and not _TARGET.value and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", n_devices)

    stages = [name for name in STAGES if getattr(config.train, name).n_steps]
    step = _STEP.value or (stages[-1] if stages else "decode")
    shape = DecodeShape(_ROWS.value, _CONTEXT.value, _CACHE_DTYPE.value)
    if _WEAK_SCALING.value:
        ladder = weak_scaling(config, _WEAK_SCALING.value, step, shape)
        print(format_weak_scaling(step, ladder))
        _OUTPUT.write({"step": step, "weak_scaling": [rung._asdict() for rung in ladder]})
        return

    device_bytes = 1e9 * _MEMORY.value
    summary = summarize(config)
    verdict = judge(config, machines, Assumed(_MFU.value, _PRICE.value, _PEAK.value))
    summary["verdict"] = verdict
    print(format_verdict(verdict, config) + "\n\n" + format_summary(summary, device_bytes), flush=True)
    if _COMPILE.value or _TARGET.value:
        if _TARGET.value:
            mesh, device_bytes = target_mesh(config, _TARGET.value)
        else:
            mesh = emulated_mesh(config)
        result = compile_step(config, step, mesh, shape)
        print("\n" + format_compiled(result, device_bytes))
        summary["compiled"] = {**result._asdict(), "peak": result.peak}
    else:
        print("\nCollectives per step and the compiler's own memory: --compile, or --target=h200x8.")
    _OUTPUT.write(summary)


def _check_flags() -> None:
    """Reject flags that would change nothing."""
    if _WEAK_SCALING.value and _TARGET.value:
        raise flags.ValidationError("--weak_scaling compiles on emulated devices; expected no --target beside it.")
    if not (_COMPILE.value or _TARGET.value or _WEAK_SCALING.value):
        given = [flag.name for flag in (_STEP, _ROWS, _CONTEXT, _CACHE_DTYPE) if flag.present]
        if given:
            raise flags.ValidationError(
                f"--{given[0]} says what to compile, and nothing is. Add --compile or --target=h200x8, or leave it out."
            )


if __name__ == "__main__":
    run_main(main)
