"""The tokenizer of a checkpoint directory: reading it, and copying its files to another one."""

import logging
import shutil
from pathlib import Path
from typing import Any

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.weights import read_json
from dsa_jax.config.checks import ConfigError
from dsa_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer

_LOG = logging.getLogger(__name__)
BYTES_FIELD = "dsa_tokenizer"
"""Field of config.json that says "bytes" where the tokenizer is UTF-8, which needs no file."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def load_checkpoint_tokenizer(directory: Path, content: dict[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where it has none that can be read, which is logged.

    Raises:
        CheckpointError: when it has more tokens than the model.
    """
    tokenizer: Tokenizer
    if (directory / "tokenizer.json").is_file():
        try:
            tokenizer = JsonTokenizer(directory)
        except (ImportError, ConfigError) as error:
            _LOG.warning("no tokenizer: %s", error)
            return None
    elif content.get(BYTES_FIELD) == "bytes":
        tokenizer = ByteTokenizer()
    elif content.get(BYTES_FIELD) is not None:
        raise CheckpointError(f"{directory / 'config.json'}: {BYTES_FIELD} is {content[BYTES_FIELD]!r}; expected 'bytes'.")
    else:
        _LOG.info("%s brings no tokenizer.json: token ids only", directory)
        return None
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, vocab_size of config.json is {vocab_size}; "
            "expected at most that many tokens. The tokenizer is that of another model."
        )
    return tokenizer


def tokenizer_name(directory: str | Path) -> str:
    """The name under which `dsa_jax.data.load_tokenizer` finds the tokenizer of a checkpoint: "bytes", or its directory."""
    content = read_json(Path(directory) / "config.json")
    is_bytes = content.get(BYTES_FIELD) == "bytes" and not (Path(directory) / "tokenizer.json").is_file()
    return "bytes" if is_bytes else str(directory)


def has_tokenizer_files(directory: str | Path) -> bool:
    """Whether a directory holds anything that `copy_tokenizer_files` copies."""
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def copy_tokenizer_files(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer to the directory `target`; returns the names of the copies.

    Args:
        source: a directory, whose tokenizer files and generation settings are copied; or the file of a tokenizer, which
            becomes tokenizer.json, with the tokenizer_config.json beside it.
    """
    if source.is_dir() or source.name in TOKENIZER_FILES:
        folder = source if source.is_dir() else source.parent
        files = {name: folder / name for name in TOKENIZER_FILES}
    else:
        files = {TOKENIZER_FILES[0]: source, TOKENIZER_FILES[1]: source.with_name(TOKENIZER_FILES[1])}
    copied = [name for name, file in files.items() if file.is_file()]
    for name in copied:
        shutil.copyfile(files[name], target / name)
    return copied
