"""Finding a Hugging Face checkpoint by what people have: a directory, a model of the local cache, or an id on the hub."""

import os
import re
from pathlib import Path

from dsa_jax.checkpoints.hf import CheckpointError
from dsa_jax.config.checks import user_path
from dsa_jax.extras import import_extra

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "README.md")


def locate_checkpoint(name: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint, downloaded where it has to be.

    Args:
        name: a directory with a config.json; a model's folder in the Hugging Face cache (`models--ORG--NAME`), of which the
            snapshot of its main revision is taken, or the only one; or `ORG/NAME` or `ORG/NAME@REVISION`, as on the hub, which
            is looked for in the cache first.

    Raises:
        CheckpointError: where it is none of these, or can be neither found nor downloaded, with what to download.
        MissingExtraError: for an id, without the `huggingface_hub` package.
    """
    path = user_path("the checkpoint", os.fspath(name))
    if (path / "snapshots").is_dir():
        return _snapshot(path)
    if path.exists() or not _ID.fullmatch(os.fspath(name)):
        return path
    return _from_hub(*os.fspath(name).partition("@")[::2])


def _snapshot(folder: Path) -> Path:
    """The snapshot of a model's folder in the cache."""
    main = folder / "refs" / "main"
    if main.is_file():
        named = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    found = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder} has no snapshot of its main revision, and {listed}; expected one. Name its directory.")
    return found[0]


def _from_hub(name: str, revision: str) -> Path:
    hub = import_extra("huggingface_hub", extra="hf", purpose=f"the checkpoint {name}")
    cache = import_extra("huggingface_hub.constants", extra="hf", purpose=f"the checkpoint {name}").HF_HUB_CACHE
    options = {"revision": revision or None, "allow_patterns": list(_FILES)}
    try:
        return Path(hub.snapshot_download(name, local_files_only=True, **options))
    except Exception as absent:  # of the many kinds that the package raises, all mean that the cache lacks it
        try:
            return Path(hub.snapshot_download(name, **options))
        except Exception as error:
            at = f" --revision {revision}" if revision else ""
            raise CheckpointError(
                f"{name} is no directory, is not in the Hugging Face cache ({cache}), and cannot be "
                f"downloaded ({type(error).__name__}). Where there is a network: hf download {name}{at}"
            ) from absent
