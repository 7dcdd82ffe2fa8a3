"""The text that the report of a run is of, recorded in the checkpoint that it exports, so that an evaluation can use it."""

from pathlib import Path
from typing import Any, NamedTuple

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.checkpoints.hf.save import TEXT_RECORD
from dsa_jax.config import ConfigError, TextConfig, from_dict, to_dict
from dsa_jax.foreign import read_object
from dsa_jax.run.files import write_object


class TextRecord(NamedTuple):
    """What the text is called, the digest of its tokens, and the settings that read and split it."""

    source: str
    sha256: str
    settings: TextConfig


def write_text_record(directory: Path, text: dict[str, Any], settings: TextConfig) -> None:
    """Record the text that `Corpus.describe` gave as `text`."""
    content = {"source": text["source"], "sha256": text["sha256"], "settings": to_dict(settings)}
    write_object(directory / TEXT_RECORD, content)


def read_text_record(directory: Path) -> TextRecord | None:
    """The record of a checkpoint; None where there is none.

    Raises:
        CheckpointError: where it is no record.
    """
    file = directory / TEXT_RECORD
    if not file.exists():
        return None
    content = read_object(file, CheckpointError, remedy="Delete it, and name the text.")
    try:
        settings = from_dict(TextConfig, content["settings"], prefix="data.text.")
        if not (isinstance(content["source"], str) and isinstance(content["sha256"], str)):
            raise TypeError
    except (ConfigError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not what a run writes. Delete it, and name the text.") from error
    return TextRecord(content["source"], content["sha256"], settings)
