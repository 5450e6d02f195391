"""The soak's training processes: each logs at a steady rate and is now and then started again, as the next
attempt of its run; and the count of what they logged against what is stored."""

from __future__ import annotations

import signal
import struct
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

from tests.fakes import DEADLINE_S, Folders, next_line, start_script
from trackagent.agent.store.contract import Reader

KEYS = 10
RATE_HZ = 200

# Logs from step argv[2] on until its standard input is closed; the file argv[1] holds how many calls have
# returned, written after each. The values are a loss with random noise, which hardly compresses.
TRAINING = f"""
import mmap, random, select, sys, time
from trackagent import client

run = client.init(experiment="soak")
with open(sys.argv[1], "r+b") as file:
    returned = memoryview(mmap.mmap(file.fileno(), 8)).cast("Q")
first = step = int(sys.argv[2])
print("ready", flush=True)
began = time.perf_counter()
while True:
    wait_s = max(0.0, began + (step - first) / {RATE_HZ} - time.perf_counter())
    if select.select([sys.stdin], [], [], wait_s)[0]:
        break
    loss = 1 / (1 + step / 1000)
    client.log({{f"metric_{{i}}": loss + random.gauss(0, 0.01) for i in range({KEYS})}}, step=step)
    step += 1
    returned[0] = step - first
print(client.finish(), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Logged:
    """What one attempt logged: steps first .. first + returned - 1, and one more perhaps if it was killed."""

    run_id: str
    attempt: int
    first: int
    returned: int
    killed: bool


class Producer:
    """One run of one rank, attempt after attempt."""

    def __init__(self, folders: Folders, base: Path) -> None:
        self.run_id = uuid4().hex
        self.logged: list[Logged] = []
        self._folders = folders
        self._counter = base / f"{self.run_id}.count"
        self._first = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        self._counter.write_bytes(bytes(8))
        process = start_script(
            self._folders,
            TRAINING,
            self._counter,
            self._first,
            TRACKAGENT_RUN_ID=self.run_id,
            TRACKAGENT_ATTEMPT=str(len(self.logged) + 1),
        )
        assert next_line(process) == "ready"
        return process

    def end(self, *, kill: bool) -> None:
        """Ends the attempt under way, by SIGKILL or by finish(), which must deliver everything."""
        if kill:
            self.process.send_signal(signal.SIGKILL)
        output, errors = self.process.communicate(timeout=DEADLINE_S)
        if not kill:
            assert (self.process.returncode, output, errors) == (0, "True\n", "")
        returned = struct.unpack("<Q", self._counter.read_bytes())[0]
        attempt = len(self.logged) + 1
        self.logged.append(Logged(self.run_id, attempt, self._first, returned, kill))
        self._first += returned + 1

    def restart(self, *, kill: bool) -> None:
        """Ends the attempt and begins the next."""
        self.end(kill=kill)
        self.process = self._start()


def missing_and_doubled(reader: Reader, logged: Sequence[Logged]) -> tuple[int, int]:
    """Records that should be stored and are not, and those stored once too often or never logged."""
    stored: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for run_id in {attempt.run_id for attempt in logged}:
        for block in reader.export(run_id):
            if "metric_0" in block.keys:
                stored[run_id, block.attempt].append(block.steps)
    missing = doubled = 0
    for attempt in logged:
        parts = stored.pop((attempt.run_id, attempt.attempt), [])
        steps = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        expected = np.arange(attempt.first, attempt.first + attempt.returned)
        allowed = np.arange(attempt.first, attempt.first + attempt.returned + attempt.killed)
        missing += len(np.setdiff1d(expected, steps))
        doubled += len(steps) - len(np.intersect1d(allowed, steps))
    doubled += sum(len(part) for parts in stored.values() for part in parts)
    return missing, doubled
