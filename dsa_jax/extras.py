"""The error for an optional package that is not installed."""


class MissingExtraError(ImportError):
    """An optional package is needed; the message says for what, and how to install it."""
