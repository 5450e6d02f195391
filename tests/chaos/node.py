"""One node in a storm: its folders, an agent that can be told to fail, the producers, and their notes."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests.chaos.oracle import (
    DIED,
    LATE,
    LEFT_BEHIND,
    LOST,
    StoredRun,
    Violation,
    check,
    read_store,
)
from tests.chaos.records import (
    ENDED,
    INCARNATION_STEPS,
    KILLED,
    RUNNING,
    Notes,
    Producer,
    read_notes,
)
from tests.chaos.switches import FOLDER_VARIABLE, Switches
from tests.fakes import DEADLINE_S, POLL_S, AgentProcess, Folders, short_folder, wait_until
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import NotFound, Reader, StoreError

ROOT = Path(__file__).parents[2]
SMALL = {"TRACKAGENT_SEGMENT_BYTES": "65536", "TRACKAGENT_MEMORY_BYTES": "262144"}


class Rank(NamedTuple):
    """A producer with its process."""

    producer: Producer
    process: subprocess.Popen[bytes]
    notes: Path
    stop: Path

    def tell_to_end(self) -> None:
        self.stop.touch()

    def noted(self) -> Notes:
        code = self.process.poll()
        state = RUNNING if code is None else ENDED if code == 0 else KILLED
        return read_notes(self.producer, self.notes, state)

    @property
    def last_begun(self) -> int:
        return max(self.noted().begun, default=-1)


class Node:
    """Made under a fresh folder.

    address: of the agent for the ranks, where it is not the agent's own. again: an agent that ends is
    followed by another one at once.
    """

    def __init__(
        self, *, deliver_interval_s: float = 0.05, address: str = "", again: bool = False
    ) -> None:
        self.base = short_folder()
        self.folders = Folders.under(self.base)
        self.switches = Switches(self.base / "switches")
        launch = [sys.executable, "-W", "error", "-m", "tests.chaos.launch", *(["again"] * again)]
        self.agent = AgentProcess(
            self.folders,
            f"--deliver-interval-s={deliver_interval_s}",
            # What is looked for are the ranks' own points, however many they say that there are.
            f"--keep-all-ranks={1 << 24}",
            command=launch,
            variables=self._variables,
        )
        self.address = address
        self.ranks: list[Rank] = []
        self.killed: set[Producer] = set()
        self._seen: dict[str, dict[str, int]] = {}
        self._last: dict[tuple[str, str, int], int] = {}
        for name in ("switches", "notes"):
            (self.base / name).mkdir()

    @property
    def _variables(self) -> dict[str, str]:
        return {FOLDER_VARIABLE: str(self.base / "switches"), "PYTHONPATH": str(ROOT)}

    def start_rank(
        self, producer: Producer, per_second: float, *, dies_at: str = "", **variables: str
    ) -> Rank:
        """dies_at: a step of steps.RANK_STEPS."""
        name = f"{producer.run_id}-{producer.rank}-{producer.incarnation}"
        notes, stop = self.base / "notes" / name, self.base / "notes" / f"{name}.stop"
        if self.address:
            variables["TRACKAGENT_AGENT"] = self.address
        variables |= {"RANK": str(producer.rank), "WORLD_SIZE": "64"}
        if dies_at:
            self.switches.set(name, dies_at)
        arguments = [
            producer.run_id,
            producer.rank,
            producer.incarnation,
            producer.seed,
            notes,
            stop,
            per_second,
        ]
        with open(self.base / f"{name}.log", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.producer", *map(str, arguments)],
                env=self.folders.environment | self._variables | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.ranks.append(Rank(producer, process, notes, stop))
        return self.ranks[-1]

    def kill(self, rank: Rank) -> None:
        rank.process.send_signal(signal.SIGKILL)
        self.killed.add(rank.producer)
        rank.process.wait(DEADLINE_S)

    @property
    def living(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.process.poll() is None]

    # --- what came of it

    def stored(self) -> dict[str, StoredRun]:
        runs = {rank.producer.run_id for rank in self.ranks}
        return read_store(self.folders.state / STORE_NAME, runs)

    def wait_for_new_records(self, ranks: Sequence[Rank], timeout_s: float = DEADLINE_S) -> float:
        """Until each of the ranks has a record stored that it logged after this call; the seconds it took."""
        began = time.monotonic()
        before = {rank: rank.last_begun for rank in ranks}
        waiting = set(ranks)

        def flow() -> bool:
            for rank in list(waiting):
                assert rank.process.poll() is None, f"{rank.producer} has ended"
            stored = self._last_stored()
            for rank in list(waiting):
                if stored.get(rank.producer, -1) > before[rank]:
                    waiting.discard(rank)
            return not waiting

        wait_until(flow, f"records of {[str(r.producer) for r in ranks]} flow", timeout_s=timeout_s)
        return time.monotonic() - began

    def check_now(self, timeout_s: float = DEADLINE_S) -> list[Violation]:
        """What is wrong while the ranks go on logging: what has returned before this call must be stored in
        time."""
        before = [rank.noted() for rank in self.ranks]
        deadline = time.monotonic() + timeout_s
        while True:
            stored = self.stored()
            # Read after the store, so that whatever it holds had been begun.
            now = [
                replace(old, begun=rank.noted().begun)
                for old, rank in zip(before, self.ranks, strict=True)
            ]
            found = check(now, stored)
            late = time.monotonic() > deadline
            if late or not found or any(violation.kind != LOST for violation in found):
                return found
            time.sleep(5 * POLL_S)

    def _last_stored(self) -> dict[Producer, int]:
        """The last metrics record of each producer that is stored, by looking at what is new."""
        with contextlib.suppress(StoreError), contextlib.closing(self._reader()) as reader:
            for run_id in {rank.producer.run_id for rank in self.ranks}:
                with contextlib.suppress(NotFound):
                    for block in reader.export(run_id, skip=self._seen.setdefault(run_id, {})):
                        for step in block.steps.tolist():
                            at = (run_id, block.source, step // INCARNATION_STEPS)
                            last = step % INCARNATION_STEPS
                            self._last[at] = max(self._last.get(at, -1), last)
        return {
            rank.producer: self._last.get(
                (rank.producer.run_id, rank.producer.source, rank.producer.incarnation), -1
            )
            for rank in self.ranks
        }

    def _reader(self) -> Reader:
        return open_reader(self.folders.state / STORE_NAME)

    def finish(self, timeout_s: float = DEADLINE_S) -> list[Violation]:
        """Tells the ranks to end, waits until all is delivered, and asks the oracle. The agent must run."""
        found: list[Violation] = []
        for rank in self.ranks:
            rank.tell_to_end()
        for rank in self.ranks:
            expected = -signal.SIGKILL if rank.producer in self.killed else 0
            try:
                code = rank.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                found.append(Violation(LATE, f"{rank.producer} does not end"))
                continue
            if code != expected:
                found.append(Violation(DIED, f"{rank.producer} ended with {code}"))
        deadline = time.monotonic() + timeout_s
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(5 * POLL_S)
        found += [Violation(LEFT_BEHIND, what) for what in left]
        return found + check([rank.noted() for rank in self.ranks], self.stored())

    def _left(self) -> list[str]:
        """What should not be there once all is delivered. A folder with a dot is one whose owner was killed
        while it made it; it may be there for an hour."""
        left = [
            f"{path}"
            for base in self.folders
            for folder in ("journals", "quarantine", "dead-letters/store")
            for path in (base / folder).glob("[!.]*")
        ]
        # As a file of SQLite's that was found damaged is called.
        left += [f"{path}" for path in self.folders.state.glob("*.damaged-*")]
        done = self.agent.run_cli("status", "--json", check=False)
        if done.returncode != 0:
            # One that died a moment ago has a successor soon.
            return [*left, f"no answer of an agent: {done.stderr}"]
        status = json.loads(done.stdout)
        left += [f"in the spool: {status['spool']}"] if status["spool"]["batches"] else []
        left += [f"in the agent's status: {one}" for one in status["producers"]]
        for run_id in {rank.producer.run_id for rank in self.ranks}:
            run = self.agent.run(run_id)
            if run is not None and run.status == "running":
                left.append(f"run {run_id} is still running")
        return left

    def end(self) -> None:
        """Ends every process."""
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.process.kill()
                rank.process.wait(DEADLINE_S)
        self.agent.close()

    def remove(self) -> None:
        shutil.rmtree(self.base)

    def close(self) -> None:
        self.end()
        self.remove()
