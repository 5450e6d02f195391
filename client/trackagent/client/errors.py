"""Errors that reach the user. After `init()` has returned, only `strict=True` lets any of them out."""

from __future__ import annotations

import struct


class TrackagentError(Exception):
    """Base of every error this package raises; the message says what to do next. `reason` is the name under
    which a run counts what was refused with it."""

    reason = "error"


class ConfigError(TrackagentError, ValueError):
    """A setting, argument or environment variable is not usable."""


class IdentityError(TrackagentError):
    """The ranks could not agree on a run: rank 0's word did not arrive."""


class JournalError(TrackagentError, OSError):
    """The journal could not be opened or extended."""

    reason = "journal full"


class TooManyCalls(JournalError):
    """More log calls at once than there are lanes."""

    reason = "too many calls at once"


class RunFinished(JournalError):
    """The run takes no more records."""

    reason = "run finished"


class ValueRefused(TrackagentError, ValueError):
    """A key, value, param or tag was refused."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


# What log() itself may run into, a full memory included; see is_a_handlers.
_OUR_ERRORS = (
    OSError,
    MemoryError,
    TrackagentError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
)


def is_a_handlers(error: Exception) -> bool:
    """Whether a signal handler raised it: log() itself runs into nothing of that kind. Values, steps and
    times that raise are dealt with where they are converted."""
    return isinstance(error, TimeoutError) or not isinstance(error, _OUR_ERRORS)
