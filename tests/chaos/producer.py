"""The process that logs: `python -m tests.chaos.producer RUN RANK INCARNATION SEED NOTES STOP PER_SECOND`.

Logs until it is killed or the file STOP exists; see records.py for what, and for its notes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from tests.chaos.records import Metrics, Producer, as_float, record
from tests.chaos.switches import SEGMENTS, Switches, die_at, follow_clock, next_step

BURST = 20
DEADLINE_S = 30.0


def main() -> None:
    run_id, rank, incarnation, seed, notes, stop, per_second = sys.argv[1:]
    switches = Switches.of_this_process()
    follow_clock(switches)
    break_segments(switches)
    die_when_told(switches, f"{run_id}-{rank}-{incarnation}")
    from trackagent import client

    producer = Producer(run_id, int(rank), int(incarnation), int(seed))
    noted = os.open(notes, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    begin(run_id)
    number = 0
    while number % BURST or not os.path.exists(stop):
        log(noted, producer, number)
        number += 1
        if number % BURST == 0:
            time.sleep(BURST / float(per_second))
    client.finish()


def begin(run_id: str) -> None:
    """Joins the run. While no folder has room for a journal, it tries again, as a launcher does."""
    from trackagent import client

    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            client.init(experiment="chaos", run_id=run_id, strict=True)
        except client.JournalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return


def log(noted: int, producer: Producer, number: int) -> None:
    """Logs the producer's record `number`, with notes."""
    from trackagent import client

    now = record(producer, number)
    # Conversions first: between the notes there is the call alone.
    values = (
        {key: as_float(bits) for key, bits in now.bits.items()} if isinstance(now, Metrics) else {}
    )
    os.write(noted, b"b %d %d\n" % (number, time.monotonic_ns()))
    try:
        if isinstance(now, Metrics):
            client.log(values, step=now.step, timestamp=now.time_s)
        elif now.kind == "param":
            client.log_params({now.key: now.text})
        elif now.kind == "tag":
            client.set_tags({now.key: now.text})
        else:
            client.event(now.text, level=now.level, step=now.step)
    except client.TrackagentError:
        os.write(noted, b"x %d %d\n" % (number, time.monotonic_ns()))
    else:
        os.write(noted, b"r %d %d\n" % (number, time.monotonic_ns()))


def break_segments(switches: Switches) -> None:
    """Lets the making of journal segments fail as the switch `segments` says."""
    from trackagent.client import journal, run, segment

    def create(path: Path, size: int, identity: bytes) -> segment.Segment:
        if how := switches.get(SEGMENTS):
            number = int(how)
            raise OSError(number, os.strerror(number), str(path))
        return segment.Segment(path, size, identity)

    run.Journal = partial[Any](journal.Journal, create=create)


def die_when_told(switches: Switches, switch: str) -> None:
    """Lets this process die at the step that its own switch names now, if it does."""
    from tests.chaos.steps import RANK_STEPS, Step, watch

    left = count(1)

    def reached(step: Step) -> None:
        if next(left) == step.nth:
            if step.with_agent:
                # Or what is under way to it would still arrive.
                with contextlib.suppress(ProcessLookupError, ValueError):  # another one was quicker
                    os.kill(agent_pid(), signal.SIGKILL)
            die_at(switches, switch)

    for step in RANK_STEPS:
        if step.name == next_step(switches, switch):
            watch(step, reached)


def agent_pid() -> int:
    """Of the agent that runs, or ran last, on this node."""
    about = Path(os.environ["TRACKAGENT_DIR"], "agent.lock").read_text()
    return int(json.loads(about)["pid"])


if __name__ == "__main__":
    main()
