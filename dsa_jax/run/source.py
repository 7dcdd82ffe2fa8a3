"""Whether what a run started from is still the same, told without reading all of it."""

import hashlib
from pathlib import Path

from dsa_jax.config import InitConfig

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


def source_fingerprint(init: InitConfig) -> str | None:
    """A digest of the weights that `init` names: of a run its checkpoints' manifests, of a Hugging Face directory its files.

    It covers names and sizes, and the content where a file is small; of a large one it takes 16 evenly spaced samples of 64
    KiB, which training on changes.

    Returns:
        Hexadecimal; None where a run starts from random weights. What is missing counts as empty.
    """
    if init.hf_dir:
        root, patterns = Path(init.hf_dir), ["*.safetensors", "*.json"]
    elif init.checkpoint:
        root, patterns = Path(init.checkpoint), [f"checkpoints/{init.stage or '*'}/*/manifest.json"]
    else:
        return None
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in root.glob(pattern)}):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        digest.update(_samples(file))
    return digest.hexdigest()


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            return file.read()
        parts = []
        for number in range(_SAMPLES):
            file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            parts.append(file.read(_SAMPLE_BYTES))
        return b"".join(parts)
