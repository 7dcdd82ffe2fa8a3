"""Conversion between run directories and Hugging Face directories."""

from collections.abc import Callable
from pathlib import Path

from dsa_jax.checkpoints.gguf import write_hf_directory
from dsa_jax.checkpoints.hf import load_pretrained, save_pretrained
from dsa_jax.checkpoints.hf.locate import locate_checkpoint
from dsa_jax.checkpoints.hf.tokenizer_files import has_tokenizer_files
from dsa_jax.checkpoints.open import is_hf_directory, open_checkpoint
from dsa_jax.config import Config, ConfigError, DataConfig, ModelConfig, TextConfig
from dsa_jax.config.model import PLAIN
from dsa_jax.config.selections import DENSE
from dsa_jax.data.tokenizer import NO_TOKENIZER, ByteTokenizer, Tokenizer
from dsa_jax.run.checkpoints import CheckpointStore
from dsa_jax.run.directory import RunDirectory, open_run
from dsa_jax.run.files import RunError, claimed

Opened = Callable[[ModelConfig | None], None]
"""Called with the model that is converted once it is read; None for a GGUF file, which is read as it is written."""


def to_hf(source: Path, target: Path, *, weight_format: str = PLAIN, opened: Opened = lambda model: None) -> str:
    """Write the newest parameters of `source` as a Hugging Face checkpoint; returns a line to print.

    Args:
        source: a run directory, a Hugging Face one, or a GGUF file of a Llama model.
        target: Hugging Face directory to write.
        weight_format: of the weights written; "fp8_blocks" quantises a Hugging Face checkpoint, or keeps it in fp8.
        opened: see `Opened`.

    Raises:
        ConfigError: for a run with a `weight_format` other than plain.
        RunError, CheckpointError: where `source` cannot be read or `target` cannot be written.
    """
    source = locate_checkpoint(source)
    if source.is_file():
        if weight_format != PLAIN:
            raise ConfigError(f"--weight_format is {weight_format}, but {source} is a GGUF file, which is written plain.")
        opened(None)
        return write_hf_directory(source, target)
    loaded = open_checkpoint(source, weight_format=weight_format)
    opened(loaded.config)
    tokenizer: Tokenizer | Path | None = loaded.tokenizer
    if is_hf_directory(source) and not isinstance(tokenizer, ByteTokenizer) and has_tokenizer_files(source):
        tokenizer = source  # whether or not it could be read here
    save_pretrained(target, loaded.config, loaded.params, tokenizer=tokenizer)
    return f"{source} is now a Hugging Face checkpoint in {target}"


def to_run(source: Path, target: Path, *, opened: Opened = lambda model: None) -> str:
    """Write a Hugging Face checkpoint as a run directory with one step, number 0 of the stage that it was trained for.

    The run can be evaluated, generated from and named as `init.checkpoint`; its text is the default one, with the
    checkpoint's tokenizer. Returns a line to print.

    Raises:
        RunError: where `source` is no Hugging Face directory or `target` holds a run.
        CheckpointError: where the checkpoint cannot be read.
    """
    source = locate_checkpoint(source)
    if not is_hf_directory(source):
        raise RunError(f"{source} is not a Hugging Face directory: its config.json names no model_type.")
    if RunDirectory(target, resumed=True).has_begun:
        raise RunError(f"{target} holds a run already; expected a new directory. Choose another --to_run, or delete it.")
    loaded = load_pretrained(source)
    opened(loaded.config)
    tokenizer = NO_TOKENIZER if loaded.tokenizer is None else "bytes"
    if (source / "tokenizer.json").is_file():
        tokenizer = str(source.resolve())
    data = DataConfig(recall_fraction=0.0, text=TextConfig(tokenizer=tokenizer))
    config = Config(name=source.resolve().name, model=loaded.config, data=data)
    config.eval.recall_sequences = 0
    stage = "pretrain"
    if loaded.config.attention.mode != DENSE:
        stage, config.train.sparse_attention = "sparse", loaded.config.attention.mode
    with claimed(target), CheckpointStore(open_run(target, config).checkpoint_dir(stage), keep=1) as store:
        store.save(0, {"params": loaded.params}, {"stage": stage, "step": 0, "source": str(source)})
        store.wait()
    return f"{source} is now the run {target}"
