"""Text that others chose, as people may be shown it: in the log, on terminals, by hooks."""

from __future__ import annotations

import logging
from typing import Any


def visible(text: str) -> str:
    """What controls a terminal, ends a line or turns the direction of writing is shown as an escape."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


class LogFormatter(logging.Formatter):
    """The log holds keys and names of runs: each message stays one line, and what it holds is seen."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = visible(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(visible(line) for line in super().formatException(ei).split("\n"))
