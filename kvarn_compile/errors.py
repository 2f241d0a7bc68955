"""Errors of the command line's own work: models, texts and files a user names."""

from kvarn.errors import KVarnError


class ModelError(KVarnError):
    """A model that cannot be found, fetched or read; the message says which and what to do."""
