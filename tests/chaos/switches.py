"""Switches: files by which a storm tells launched processes what is to go wrong. Imports nothing of ours,
since the clock must be changed before anything else is imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

FOLDER_VARIABLE = "CHAOS_SWITCHES"
# What a storm sets,
CLOCK, SPOOL, STORE, SEGMENTS, STEP = "clock", "spool", "store", "segments", "step"
# and what the launched processes say: the steps at which they died, and their exit codes.
REACHED, DEATHS = "reached", "deaths"
_CLOCK_POLL_S = 0.05


class Switches:
    """The switches in a folder: on is a file, its content how."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_this_process(cls) -> Switches:
        return cls(Path(os.environ[FOLDER_VARIABLE]))

    def get(self, name: str) -> str:
        """How it is on, "" when it is off."""
        try:
            with open(self.folder / name) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def set(self, name: str, how: str) -> None:
        making = self.folder / f".{name}"
        making.write_text(how)
        making.rename(self.folder / name)

    def clear(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


def next_step(switches: Switches, switch: str) -> str:
    """The step at which this process is to die; the switch may name more, one a line, for those after it."""
    return switches.get(switch).partition("\n")[0]


def die_at(switches: Switches, switch: str) -> NoReturn:
    """Ends this process as SIGKILL does, at the step that the switch names; leaves the name as the proof."""
    step, _, rest = switches.get(switch).partition("\n")
    if rest:
        switches.set(switch, rest)
    else:
        switches.clear(switch)
    with open(switches.folder / REACHED, "a") as file:
        file.write(f"{step}\n")
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(step)


def follow_clock(switches: Switches) -> None:
    """From now on the time of day is that of the system plus what the switch `clock` says, in seconds."""
    assert not any(name.startswith("trackagent") for name in sys.modules)
    system_ns, offset_ns = time.time_ns, [0]

    def follow() -> None:
        while True:
            offset_ns[0] = round(float(switches.get(CLOCK) or 0) * 1e9)
            time.sleep(_CLOCK_POLL_S)

    time.time_ns = lambda: system_ns() + offset_ns[0]
    time.time = lambda: (system_ns() + offset_ns[0]) / 1e9
    threading.Thread(target=follow, name="clock", daemon=True).start()
