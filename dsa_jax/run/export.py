"""The Hugging Face checkpoint that a run writes into its directory: it replaces only what the run itself wrote there."""

from pathlib import Path

from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.environment import fingerprint
from dsa_jax.run.files import RunError


def require_own_export(run: RunDirectory, *, replacement: Path | None = None) -> None:
    """Check that the run may write its export: nothing is there, or an export that environment.json records.

    Args:
        run: the run.
        replacement: the complete new export; what equals it may stay, whoever wrote it.

    Raises:
        RunError: where something else is there, or a link.
    """
    target = run.export_path
    if not target.is_symlink() and not target.exists():
        return
    if target.is_dir() and not target.is_symlink():
        found = _fingerprint(target)
        if not any(target.iterdir()) or found in run.exports or (replacement and found == _fingerprint(replacement)):
            return
    raise RunError(
        f"{target} is not what this run wrote, and its Hugging Face checkpoint would replace it. Move it away, then run the "
        "same command again."
    )


def admit_export(run: RunDirectory, complete: Path) -> None:
    """`require_own_export`, then record `complete` as the run's own, before it takes its place: killed between, both are."""
    require_own_export(run, replacement=complete)
    run.record_export(_fingerprint(complete))


def _fingerprint(directory: Path) -> str:
    return fingerprint(directory, "**/*")
