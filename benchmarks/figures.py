"""What a benchmark says: figures with their budgets; and what benchmarks need, a node of their own."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 30.0


class BenchmarkError(Exception):
    """Something could not be measured; the message says why."""


class NotOnThisMachine(BenchmarkError):
    """What is to be measured is not here, which is no failure."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table. budget: the largest or, with `at_least`, the smallest value that keeps the
    promise; None: no promise was made, the figure explains another one."""

    name: str
    value: float
    unit: str
    budget: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the promise is kept."""
        if self.budget is None:
            return None
        return self.value >= self.budget if self.at_least else self.value <= self.budget


@dataclass(frozen=True)
class Node:
    """Folders of an agent of its own, the agent while it runs, and the processes that log there."""

    directory: Path
    state: Path
    agent: psutil.Process | None
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def store_path(self) -> Path:
        """Where the agent stores."""
        return self.state / "store.db"

    @property
    def token_path(self) -> Path:
        """The cluster's token, where the agent is a hub."""
        return self.state / "token"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process log there: ours, less every other trackagent variable."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TRACKAGENT_", "MLFLOW_"))
        }
        return kept | {
            "TRACKAGENT_DIR": str(self.directory),
            "TRACKAGENT_STATE": str(self.state),
            "OMP_NUM_THREADS": "1",
        }


@contextmanager
def node(
    *, agent: bool, collect: str = "all", hub: bool = False, flags: Sequence[str] = ()
) -> Iterator[Node]:
    """An empty node: journals in memory, state in the system's folder for temporary files (TMPDIR chooses the
    disk). collect: what its agent samples; hub: it takes what other nodes forward, with a token; flags: what
    it is told besides. Ends what runs there and removes everything."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="tb-", dir=memory))
    state = Path(tempfile.mkdtemp(prefix="tb-"))
    process: subprocess.Popen[bytes] | None = None
    here = Node(directory, state, None)
    try:
        if hub:
            here.token_path.touch(mode=0o600)
            here.token_path.write_text(secrets.token_hex(32))
        if agent:
            listening = ["--listen=:0", f"--token-file={here.token_path}"]
            with (state / "agent.log").open("wb") as log:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "trackagent.agent.cli", "start"),
                        *("--log-level=warning", f"--collect={collect}"),
                        *(listening if hub else ()),
                        *flags,
                    ],
                    env=here.environment,
                    stdout=log,
                    stderr=log,
                )
            _wait_until_it_listens(process, here, "hub.json" if hub else "agent.sock")
            here = Node(directory, state, psutil.Process(process.pid))
        yield here
    finally:
        for worker in [*here.workers, process]:
            if worker is not None:
                worker.kill()
                worker.wait()
        shutil.rmtree(directory)
        shutil.rmtree(state)


def _wait_until_it_listens(process: subprocess.Popen[bytes], here: Node, name: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (here.directory / name).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            said = (here.state / "agent.log").read_text(errors="replace")
            raise BenchmarkError(f"the agent does not start:\n{said}")
        time.sleep(0.02)


def start_worker(
    module: str, here: Node, arguments: Sequence[object], *, more: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Begins `python -m benchmarks.<module> <arguments>` as a process that logs on the node."""
    worker = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)],
        env={**here.environment, **(more or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    here.workers.append(worker)
    return worker


def outcome(process: subprocess.Popen[str], timeout_s: float = 300.0) -> Any:
    """The JSON that a worker prints last. BenchmarkError when it fails; its standard error has said why."""
    try:
        output = process.communicate(timeout=timeout_s)[0]
    finally:
        process.kill()
    if process.returncode:
        raise BenchmarkError(f"`{shlex.join(process.args)}` ended with {process.returncode}")
    return json.loads(output.splitlines()[-1])


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
    """Returns when `condition` holds; BenchmarkError when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)
