"""The Hugging Face checkpoint that a run writes into its directory: it replaces only what the run itself wrote there."""

import logging
import os
from pathlib import Path

from dsa_jax.run.directory import RunDirectory
from dsa_jax.run.environment import fingerprint
from dsa_jax.run.files import RunError, atomic_write_text
from dsa_jax.run.signed import is_signed, signed

_LOG = logging.getLogger(__name__)
_CARD = "README.md"


def require_own_export(run: RunDirectory, *, replacement: Path | None = None) -> None:
    """Check that the run may write its export: nothing is there, or an export that environment.json records.

    A README.md beside it is the run's own while it is as `write_card` wrote it.

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
        is_own = found in run.exports or (replacement is not None and found == _fingerprint(replacement))
        if not any(target.iterdir()) or (is_own and _has_no_foreign_card(target)):
            return
    raise RunError(
        f"{target} is not what this run wrote, and its Hugging Face checkpoint would replace it. Move it away, then run the "
        "same command again."
    )


def admit_export(run: RunDirectory, complete: Path) -> None:
    """`require_own_export`, then record `complete` as the run's own, before it takes its place: killed between, both are."""
    require_own_export(run, replacement=complete)
    run.record_export(_fingerprint(complete))


def write_card(run: RunDirectory, text: str) -> None:
    """Write the model card of the export to its README.md; one that somebody wrote or edited stays, and a warning says so."""
    if not _has_no_foreign_card(run.export_path):
        _LOG.warning("%s is kept: it is not, or no more, what this run wrote", run.export_path / _CARD)
        return
    atomic_write_text(run.export_path / _CARD, signed(text))


def _has_no_foreign_card(directory: Path) -> bool:
    card = directory / _CARD
    return not os.path.lexists(card) or is_signed(card)


def _fingerprint(directory: Path) -> str:
    return fingerprint(directory, "**/*", without=_CARD)
