"""Opening a run directory or a Hugging Face directory as a `Pretrained`."""

from pathlib import Path

from dsa_jax.checkpoints.hf import load_pretrained
from dsa_jax.checkpoints.pretrained import Pretrained
from dsa_jax.config import ConfigError
from dsa_jax.config.model import PLAIN
from dsa_jax.data import load_tokenizer
from dsa_jax.data.tokenizer import NO_TOKENIZER
from dsa_jax.parallel.placement import current_mesh
from dsa_jax.run.files import RunError, read_object
from dsa_jax.train.init import load_run


def is_hf_directory(directory: str | Path) -> bool:
    """Whether `directory` is a Hugging Face checkpoint: its config.json names a `model_type`."""
    try:
        return "model_type" in read_object(Path(directory) / "config.json", follow=True)
    except RunError:
        return False


def open_checkpoint(directory: str | Path, *, weight_format: str = PLAIN) -> Pretrained:
    """The newest parameters of a run directory, or a Hugging Face checkpoint, with the tokenizer they were trained with.

    On a mesh (`parallel.placement.on_mesh`) the parameters are sharded by the rules. `weight_format` is that of
    `load_pretrained`; a run has plain weights.

    Raises:
        ConfigError: for fp8 weights of a run, or where the mesh does not divide a parameter.
        RunError: when `directory` is neither, or a run without a usable checkpoint.
        CheckpointError: when it is a Hugging Face directory that cannot be read.
    """
    if is_hf_directory(directory):
        return load_pretrained(directory, mesh=current_mesh(), weight_format=weight_format)
    if weight_format != PLAIN:
        raise ConfigError(
            f"{directory} is no Hugging Face directory; only these load with weight_format {weight_format!r}. Write the run as "
            f"one first: python -m experiments.convert --checkpoint={directory} --to_hf=DIR"
        )
    run = load_run(Path(directory))
    name = run.config.data.text.tokenizer
    return Pretrained(run.config.model, run.model, run.params, None if name == NO_TOKENIZER else load_tokenizer(name))
