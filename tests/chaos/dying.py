"""A rank that forks others, each of which dies at another bytecode instruction of the client.

    python -m tests.chaos.dying WHERE RUN SEED NOTES FIRST STRIDE

WHERE: "records", in log() and its like; "segments", where folders and segments are made, from init() on. The
n-th one is rank n. Prints how many there were: the last one came to its end alive.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from tests.chaos.producer import log
from tests.chaos.records import Producer
from trackagent import client
from trackagent.client import facts, identity, run  # noqa: F401 - before the forks, once for all

# How many records each logs: 20 in which it may die, or enough for several segments.
RECORDS = {"records": 40, "segments": 500}
FIRST_RECORD = 20
MAKE_SEGMENTS = ("_define", "_new_segment", "add_lane", "prepare", "roll")


class Death:
    """Dies at the n-th instruction of those that touch what others see; the rest computes."""

    def __init__(self, where: str, instruction: int) -> None:
        self._where = where
        self._left = instruction

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not self._counts(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace

    def _counts(self, frame: FrameType) -> bool:
        folder, name = os.path.split(frame.f_code.co_filename)
        if not folder.endswith("/trackagent/client"):
            return False
        makes = name in ("segment.py", "folder.py") or frame.f_code.co_name in MAKE_SEGMENTS
        return makes or (
            self._where == "records" and name in ("run.py", "producer.py", "journal.py")
        )


def logs(where: str, producer: Producer, notes: Path, instruction: int) -> None:
    """One rank's life."""
    noted = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.environ["RANK"] = str(producer.rank)
    death = Death(where, instruction)
    if where == "segments":
        sys.settrace(death.trace)
    client.init(experiment="chaos", run_id=producer.run_id, strict=True)
    for number in range(RECORDS[where]):
        if number == FIRST_RECORD:
            sys.settrace(death.trace)
        log(noted, producer, number)
    sys.settrace(None)


def main() -> None:
    where, run_id, seed, notes, first, stride = sys.argv[1:]
    for rank, instruction in zip(count(1), count(int(first), int(stride))):
        child = os.fork()
        if not child:
            producer = Producer(run_id, rank, 0, int(seed))
            logs(where, producer, Path(notes) / f"{run_id}-{rank}", instruction)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            sys.stdout.write(f"{rank}\n")
            return
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


if __name__ == "__main__":
    main()
