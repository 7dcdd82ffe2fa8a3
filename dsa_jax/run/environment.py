"""The environment of a run: versions, device, git revision, and a fingerprint of the weights that it started from."""

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from dsa_jax.config import InitConfig

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def describe_environment() -> dict[str, Any]:
    """Versions, device and source revision of this process; `implementations` is filled in as they are chosen."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": {
            "backend": jax.default_backend(),
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "git": git_revision(Path(__file__)),
        "implementations": {},
    }


def git_revision(source_file: Path) -> dict[str, Any] | None:
    """`{"revision", "dirty"}` of the checkout that tracks `source_file`; None when no git checkout does."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(source_file.parent), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside another project's checkout: only a tracked file is our own source.
    if git("ls-files", "--error-unmatch", source_file.name) is None:
        return None
    revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    if revision is None or status is None:
        return None
    return {"revision": revision, "dirty": bool(status)}


def source_fingerprint(init: InitConfig) -> str | None:
    """`fingerprint` of the weights that `init` names; None where a run starts from random weights.

    It covers the manifests of a run's checkpoints, or the weights and JSON files of a Hugging Face directory.
    """
    if init.hf_dir:
        return fingerprint(Path(init.hf_dir), "*.safetensors", "*.json")
    if init.checkpoint:
        return fingerprint(Path(init.checkpoint), f"checkpoints/{init.stage or '*'}/*/manifest.json")
    return None


def fingerprint(root: Path, *patterns: str, without: str = "") -> str:
    """A hexadecimal digest of the regular files below `root` that match: names, sizes, and the content of small files.

    Of a large one it has 16 evenly spaced samples of 64 KiB, which further training changes. Missing files are left out, and
    so is the file `without`.
    """
    digest = hashlib.sha256()
    found = {file for pattern in patterns for file in root.glob(pattern) if file.is_file()}
    for file in sorted(found - {root / without}):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode(errors="surrogateescape"))
        digest.update(_samples(file))
    return digest.hexdigest()


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return file.read()
        samples = b""
        for number in range(_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            samples += file.read(_SAMPLE_BYTES)
        return samples


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
