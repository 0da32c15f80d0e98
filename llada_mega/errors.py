"""Errors that a user can mend.

Everything a user can get wrong raises a subclass of :class:`LladaMegaError` whose message is one line that names
the key or file, the value, and a fix. ``cli.py`` prints it as ``error: ...`` without a traceback.
"""

from __future__ import annotations


class LladaMegaError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(LladaMegaError):
    """A configuration key is unknown, has the wrong type, or contradicts another key."""


class DataError(LladaMegaError):
    """An input file, an indexed dataset or a tokenizer is missing, empty, damaged or does not fit."""


class CheckpointError(LladaMegaError):
    """A checkpoint is missing, incomplete, damaged or belongs to another model or curriculum."""


class TrainingError(LladaMegaError):
    """A run cannot go on (non-finite loss, spike policy ``stop``, no disk space, ...)."""
