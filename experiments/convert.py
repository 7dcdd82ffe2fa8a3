r"""A run's newest checkpoint, or a GGUF file, as a Hugging Face directory, and a Hugging Face directory as a run.

python -m experiments.convert --checkpoint=runs/quickstart --to_hf=exported
python -m experiments.convert --checkpoint=exported --to_run=runs/imported
python -m experiments.convert --checkpoint=SmolLM2-135M-Instruct.Q4_1.gguf --to_hf=smollm2
python -m experiments.convert --checkpoint=exported --to_hf=exported_fp8 --weight_format=fp8_blocks

No accelerator is used: the model must fit into host memory.
"""

from absl import flags

from dsa_jax.config import ConfigError
from experiments.flags import run_main
from experiments.values import path_flag

_CHECKPOINT = path_flag("checkpoint", None, "Run directory, Hugging Face directory or GGUF file to read.", required=True)
_TO_HF = path_flag("to_hf", "", "Hugging Face directory to write.")
_WEIGHT_FORMAT = flags.DEFINE_enum(
    "weight_format", "plain", ["plain", "fp8_blocks"], "--to_hf: plain, or e4m3 with block scales, as DeepSeek publishes."
)
_TO_RUN = path_flag("to_run", "", "Run directory to write.")


def main(argv: list[str]) -> None:
    """Convert."""
    del argv
    from pathlib import Path

    import jax

    jax.config.update("jax_platforms", "cpu")
    from dsa_jax.checkpoints.convert import to_hf, to_run
    from dsa_jax.opening import opening_line

    if bool(_TO_HF.value) == bool(_TO_RUN.value):
        raise ConfigError("give exactly one of --to_hf=DIR and --to_run=DIR.")
    if _TO_RUN.value and _WEIGHT_FORMAT.value != "plain":
        raise ConfigError(f"--weight_format is {_WEIGHT_FORMAT.value}, but a run has plain weights; it goes with --to_hf=DIR.")
    opened = lambda model: print(opening_line(model), flush=True)
    source = Path(_CHECKPOINT.value)
    if _TO_HF.value:
        print(to_hf(source, Path(_TO_HF.value), weight_format=_WEIGHT_FORMAT.value, opened=opened))
    else:
        print(to_run(source, Path(_TO_RUN.value), opened=opened))


if __name__ == "__main__":
    run_main(main)
