"""The tokenizer of a checkpoint directory: reading it, and copying its files to another one."""

import logging
from pathlib import Path
from typing import Any

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.weights import read_json
from dsa_jax.config.checks import ConfigError
from dsa_jax.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer

_LOG = logging.getLogger(__name__)
BYTES_FIELD = "dsa_tokenizer"
"""Field of config.json that says "bytes" where the tokenizer is UTF-8, which needs no file."""

SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = (
    "tokenizer.json", *SETTINGS_FILES, "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip


def load_checkpoint_tokenizer(directory: Path, content: dict[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a checkpoint; None where it has none that can be read, which is logged.

    Raises:
        CheckpointError: when it gives text ids that the model has no embedding for.
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
    last = tokenizer.vocab_size - 1
    if last >= vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {last + 1} tokens, vocab_size of config.json is {vocab_size}, so the model has no "
            f"embedding for token {last}, {tokenizer.decode([last], control_tokens=True)!r}; expected ids below {vocab_size}. "
            "Remove the tokens beyond from the tokenizer's files, or take the weights that were resized for them."
        )
    return tokenizer


def tokenizer_name(directory: str | Path) -> str:
    """The name under which `dsa_jax.data.load_tokenizer` finds the tokenizer of a checkpoint: "bytes", or its directory."""
    content = read_json(Path(directory) / "config.json")
    is_bytes = content.get(BYTES_FIELD) == "bytes" and not (Path(directory) / "tokenizer.json").is_file()
    return "bytes" if is_bytes else str(directory)


def has_tokenizer_files(directory: str | Path) -> bool:
    """Whether a directory holds anything of `tokenizer_files`."""
    return any((Path(directory) / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_files(source: Path) -> dict[str, Path]:
    """The files of a tokenizer, by the names that they have in a checkpoint.

    Args:
        source: a directory, with its tokenizer files and generation settings; or the file of a tokenizer, which becomes
            tokenizer.json, with the files beside it that declare tokens and roles.
    """
    if source.is_dir() or source.name in TOKENIZER_FILES:
        folder = source if source.is_dir() else source.parent
        files = {name: folder / name for name in TOKENIZER_FILES}
    else:
        files = {"tokenizer.json": source} | {name: source.with_name(name) for name in SETTINGS_FILES}
    return {name: file for name, file in files.items() if file.is_file()}


def end_tokens(files: dict[str, Path]) -> list[int]:
    """Ids that end a text by the files of a tokenizer: its end-of-text, and those of its generation settings."""
    ends: list[int] = []
    if "tokenizer.json" in files:
        try:
            ends.append(JsonTokenizer(files["tokenizer.json"]).end_of_text_id)
        except (ImportError, ConfigError) as error:
            _LOG.warning("the end-of-text token is not known: %s", error)
    if "generation_config.json" in files:
        ends += stated_end_tokens(read_json(files["generation_config.json"]))
    return ends


def stated_end_tokens(settings: dict[str, Any]) -> list[int]:
    """The `eos_token_id` of a generation_config.json as a list."""
    stated = settings.get("eos_token_id")
    return [token for token in (stated if isinstance(stated, list) else [stated]) if type(token) is int]
