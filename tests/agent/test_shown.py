"""What others chose is shown, not obeyed."""

from __future__ import annotations

import logging

import pytest

from trackagent.agent.shown import LogFormatter, visible

# A line's end of another kind, a turn of the direction, an escape of terminals, half of a pair.
HOSTILE = "loss\u2028\u202e\x1b[2J\ud800"
SHOWN = r"loss\u2028\u202e\x1b[2J\ud800"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("train/loss", "train/loss"), ("größe 損失", "größe 損失"), (HOSTILE, SHOWN)],
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert visible(text) == shown


def logged(message: str, problem: Exception | None = None) -> list[str]:
    """The lines of the log that this makes."""
    what = {"levelname": "ERROR", "msg": "run x: %s", "args": (message,)}
    record = logging.makeLogRecord(what | {"exc_info": problem and (ValueError, problem, None)})
    return LogFormatter("%(levelname)s %(message)s").format(record).split("\n")


def test_a_message_in_the_log_is_one_line_that_can_be_seen() -> None:
    assert logged(f"{HOSTILE}\nERROR all is lost") == [rf"ERROR run x: {SHOWN}\nERROR all is lost"]


def test_an_exception_in_the_log_keeps_its_lines() -> None:
    assert logged("cannot", ValueError(f"{HOSTILE}\nnext")) == [
        "ERROR run x: cannot",
        f"ValueError: {SHOWN}",
        "next",
    ]
