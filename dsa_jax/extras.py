"""Optional packages: imported where they are used, with the command that installs them where they are missing."""

import importlib
import importlib.util
from typing import Any


class MissingExtraError(ImportError):
    """An optional package is needed; the message says for what, and how to install it."""


def is_installed(package: str) -> bool:
    """Whether `package` can be imported."""
    return importlib.util.find_spec(package) is not None


def import_extra(module: str, *, extra: str, purpose: str) -> Any:
    """An optional module.

    Args:
        module: its full name.
        extra: the extra of dsa-jax that installs it.
        purpose: what needs it; begins the message.

    Raises:
        MissingExtraError: where it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingExtraError(f"{purpose} needs the {package} package. Run: pip install 'dsa-jax[{extra}]'") from error
