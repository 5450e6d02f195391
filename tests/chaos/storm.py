"""Carries a schedule out on a node: starts what logs, does what is to go wrong, and measures the recovery."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from tests.chaos.node import SMALL, Node, Rank
from tests.chaos.oracle import DIED, LATE, Violation
from tests.chaos.proxy import Proxy
from tests.chaos.records import Producer
from tests.chaos.schedule import Fault, Gust, Load, Schedule
from tests.chaos.switches import CLOCK, REACHED, SEGMENTS, SPOOL, STEP, STORE
from tests.fakes import COMMAND, DEADLINE_S, wait_until

RECOVERY_DEADLINE_S = 60.0
# What an agent that is away for a second or two makes a fast rank fill.
FEW = {"TRACKAGENT_JOURNAL_BYTES": str(5 * 65536)}
STATE_MIB, MEMORY_MIB = 48, 8


@dataclass
class Outcome:
    """What a storm did, and what came of it. longest_recovery_s: from the end of a gust until every living
    rank has a record in the store that it logged after that."""

    seed: int
    seconds: float
    faults: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    logged: int = 0
    returned: int = 0
    refused: int = 0
    longest_recovery_s: float = 0.0
    violations: list[Violation] = field(default_factory=list)
    folder: Path | None = None  # kept where something is wrong


def can_mount(folder: Path) -> str:
    """Why no small file system can be mounted on a folder; "" when it can."""
    try:
        _mount(folder, 1)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"mounting a tmpfs: {error}"
    _unmount(folder)
    return ""


def _mount(folder: Path, mebibytes: int) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = f"size={mebibytes}m,mode=0700"
    command = ["mount", "-t", "tmpfs", "-o", options, "trackagent-chaos", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def run(plan: Schedule, *, small_disks: bool) -> Outcome:
    """One storm. small_disks: state and memory folder on file systems of a few MiB."""
    storm = _Storm(plan, small_disks=small_disks)
    try:
        storm.rage()
    finally:
        storm.close()
    return storm.outcome


class _Storm:
    def __init__(self, plan: Schedule, *, small_disks: bool) -> None:
        self.outcome = Outcome(plan.seed, plan.seconds)
        self._plan = plan
        self._chance = random.Random(plan.seed)
        self._node = Node()
        self._mounted: list[Path] = []
        self._lock = threading.Lock()
        self._ended = 0.0
        self._disturbed: set[Rank] = set()
        if small_disks:
            sizes = zip(self._node.folders, (MEMORY_MIB, STATE_MIB), strict=True)
            for folder, mebibytes in sizes:
                _mount(folder, mebibytes)
                self._mounted.append(folder)
        self._proxy = Proxy(self._node.base / "proxy.sock", self._node.agent.address, plan.seed)
        self._loads: dict[tuple[str, int], Load] = {}
        self._incarnations: Counter[tuple[str, int]] = Counter()

    def rage(self) -> None:
        """The whole storm, then the oracle."""
        began = time.monotonic()
        try:
            self._proxy.start()
            self._node.agent.start()
            for load in self._plan.loads:
                run_id = UUID(int=(self._plan.seed << 64) + load.run).hex
                self._loads[run_id, load.rank] = load
                self._start_rank(run_id, load.rank)
            self._node.wait_for_new_records(self._node.living)
            for gust in self._plan.gusts:
                if time.monotonic() - began > self._plan.seconds:
                    break
                self._blow(gust)
            self.outcome.violations += self._node.finish(RECOVERY_DEADLINE_S)
        except AssertionError as error:
            self.outcome.violations.append(Violation(LATE, str(error)))
        for rank in self._node.ranks:
            noted = rank.noted()
            self.outcome.logged += len(noted.begun)
            self.outcome.returned += len(noted.returned)
            self.outcome.refused += len(noted.refused)

    def close(self) -> None:
        for rank in self._disturbed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, signal.SIGCONT)
        keep = bool(self.outcome.violations)
        self.outcome.folder = self._node.base if keep else None
        self._node.end()
        self._proxy.cut()
        if not keep:
            for folder in self._mounted:
                _unmount(folder)
            self._node.remove()

    def _start_rank(self, run_id: str, rank: int) -> Rank:
        load = self._loads[run_id, rank]
        incarnation = self._incarnations[run_id, rank]
        self._incarnations[run_id, rank] += 1
        producer = Producer(run_id, rank, incarnation, self._plan.seed)
        variables = SMALL | FEW if load.small else {}
        if load.run % 2 == 0:
            variables["TRACKAGENT_AGENT"] = self._proxy.address
        return self._node.start_rank(producer, load.per_second, **variables)

    def _blow(self, gust: Gust) -> None:
        time.sleep(gust.after_s)
        with ThreadPoolExecutor(len(gust.faults)) as pool:
            for done in [pool.submit(self._inject, fault) for fault in gust.faults]:
                done.result()
        self._disturbed.clear()
        self._have_agent()
        self._node.wait_for_new_records(self._node.living, RECOVERY_DEADLINE_S)
        recovery_s = time.monotonic() - self._ended
        self.outcome.longest_recovery_s = max(self.outcome.longest_recovery_s, recovery_s)

    def _inject(self, fault: Fault) -> None:
        time.sleep(fault.at_s)
        with FAULTS[fault.kind](self, fault):
            with self._lock:
                self.outcome.faults[fault.kind] += 1
            time.sleep(fault.for_s)
            self._ended = time.monotonic()

    def _have_agent(self) -> None:
        """Starts the agent again if it has ended: it may have died of a fault, or found no room to start."""

        def listens() -> bool:
            process = self._node.agent.process
            if process is not None and process.poll() is None:
                return True
            with contextlib.suppress(AssertionError):
                self._node.agent.start()
                return True
            return False

        wait_until(listens, f"the agent starts:\n{self._node.agent.output}")

    # --- faults: each does its harm, and takes it back when the block ends

    def _rank(self, fault: Fault) -> Rank:
        """The rank that a fault is about."""
        with self._lock:
            living = [rank for rank in self._node.living if rank not in self._disturbed]
            chosen = living[int(fault.how) % len(living)]
            self._disturbed.add(chosen)
        return chosen

    @contextlib.contextmanager
    def rank_killed(self, fault: Fault) -> Iterator[None]:
        rank = self._rank(fault)
        self._node.kill(rank)
        yield
        self._start_rank(rank.producer.run_id, rank.producer.rank)

    @contextlib.contextmanager
    def rank_stopped(self, fault: Fault) -> Iterator[None]:
        rank = self._rank(fault)
        rank.process.send_signal(signal.SIGSTOP)
        yield
        rank.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def agent_killed(self, fault: Fault) -> Iterator[None]:
        self._node.agent.kill()
        yield
        self._have_agent()

    @contextlib.contextmanager
    def both_killed(self, fault: Fault) -> Iterator[None]:
        rank = self._rank(fault)
        assert self._node.agent.process is not None
        subprocess.run(
            ["kill", "-9", str(self._node.agent.process.pid), str(rank.process.pid)], check=True
        )
        self._node.kill(rank)
        self._node.agent.kill()
        yield
        self._start_rank(rank.producer.run_id, rank.producer.rank)
        self._have_agent()

    @contextlib.contextmanager
    def agent_restarted(self, fault: Fault) -> Iterator[None]:
        if (code := self._node.agent.stop()) != 0:
            self.outcome.violations.append(Violation(DIED, f"the agent stopped with {code}"))
        yield
        self._have_agent()

    @contextlib.contextmanager
    def agent_stopped(self, fault: Fault) -> Iterator[None]:
        assert self._node.agent.process is not None
        self._node.agent.process.send_signal(signal.SIGSTOP)
        yield
        self._node.agent.process.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def agent_dies(self, fault: Fault) -> Iterator[None]:
        self._node.switches.set(STEP, fault.how)
        yield
        self._node.switches.clear(STEP)
        if reached := self._node.switches.get(REACHED).strip():
            self.outcome.reached[reached] += 1
            self._node.switches.clear(REACHED)
            assert self._node.agent.process is not None
            self._node.agent.process.wait(DEADLINE_S)
            self._have_agent()

    @contextlib.contextmanager
    def second_agent(self, fault: Fault) -> Iterator[None]:
        assert self._node.agent.process is not None
        pid = self._node.agent.process.pid
        done = subprocess.run(
            [COMMAND, "start"],
            env=self._node.folders.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        if done.returncode != 1 or f"(pid {pid})" not in done.stderr:
            what = f"a second agent beside {pid} ended with {done.returncode}: {done.stderr}"
            self.outcome.violations.append(Violation(DIED, what))
        yield

    @contextlib.contextmanager
    def cut(self, fault: Fault) -> Iterator[None]:
        self._proxy.cut()
        yield
        self._proxy.start()

    @contextlib.contextmanager
    def proxy_does(self, name: str, value: float) -> Iterator[None]:
        setattr(self._proxy, name, value)
        yield
        setattr(self._proxy, name, type(value)(0))

    @contextlib.contextmanager
    def reordered(self, fault: Fault) -> Iterator[None]:
        """Within a connection, and across a reconnect."""
        self._proxy.swaps = self._proxy.replays = True
        yield
        self._proxy.cut()
        self._proxy.start()
        time.sleep(fault.for_s)
        self._proxy.swaps = self._proxy.replays = False

    @contextlib.contextmanager
    def full(self, folder: Path) -> Iterator[None]:
        ballast = folder / "ballast"
        descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
        try:
            with contextlib.suppress(OSError):
                while True:
                    os.write(descriptor, bytes(1 << 16))
            yield
        finally:
            os.close(descriptor)
            ballast.unlink()

    @contextlib.contextmanager
    def switched(self, name: str, how: str) -> Iterator[None]:
        self._node.switches.set(name, how)
        yield
        self._node.switches.clear(name)

    @contextlib.contextmanager
    def short_writes(self, fault: Fault) -> Iterator[None]:
        """What grows beyond a limit is written in part, then not at all."""
        assert self._node.agent.process is not None
        pid = self._node.agent.process.pid
        most = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        with contextlib.suppress(ProcessLookupError):
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (int(fault.how), before[1]))
        yield
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, most)


_Act = Callable[[_Storm, Fault], contextlib.AbstractContextManager[None]]
FAULTS: dict[str, _Act] = {
    "rank killed": _Storm.rank_killed,
    "rank stopped": _Storm.rank_stopped,
    "agent killed": _Storm.agent_killed,
    "rank and agent killed": _Storm.both_killed,
    "agent restarted": _Storm.agent_restarted,
    "agent stopped": _Storm.agent_stopped,
    "agent dies at a step": _Storm.agent_dies,
    "second agent": _Storm.second_agent,
    "connection cut": _Storm.cut,
    "connection delayed": lambda storm, fault: storm.proxy_does("delay_s", float(fault.how)),
    "connection doubles": lambda storm, fault: storm.proxy_does("doubles", True),
    "connection reorders": _Storm.reordered,
    "acknowledgements dropped": lambda s, fault: s.proxy_does("drops_acknowledgements", True),
    "state disk full": lambda storm, fault: storm.full(storm._node.folders.state),
    "memory full": lambda storm, fault: storm.full(storm._node.folders.directory),
    "spool fails": lambda storm, fault: storm.switched(SPOOL, fault.how),
    "store fails": lambda storm, fault: storm.switched(STORE, fault.how),
    "segments fail": lambda s, fault: s.switched(SEGMENTS, str(getattr(errno, fault.how))),
    "short writes": _Storm.short_writes,
    "clock steps": lambda storm, fault: storm.switched(CLOCK, fault.how),
}
