"""The agents of several hosts, a job over them, and what came of it at the hub, as the oracle judges it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.chaos.oracle import LATE, LEFT_BEHIND, LOST, Violation, check, read_store
from tests.chaos.records import ENDED, KILLED, RUNNING, Notes, Producer, read_notes
from tests.fakes import (
    COMMAND,
    DEADLINE_S,
    TORCHRUN_S,
    AgentProcess,
    Folders,
    short_folder,
    wait_until,
)
from tests.multihost.network import INTERFACE, Host, Network
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store.contract import RunSummary

ROOT = Path(__file__).parents[2]
JOB = ROOT / "tests" / "multihost" / "job.py"
PORT = 29400
PER_SECOND = 30
LOOK_S = 0.5


@dataclass(frozen=True)
class Node:
    """A host with its folders and its agent."""

    host: Host
    base: Path
    folders: Folders
    agent: AgentProcess

    @property
    def output(self) -> Path:
        """What the job's processes said there."""
        return self.base / "job.log"


@dataclass
class Job:
    """One launcher on each host, and the ranks that it starts."""

    notes: Path
    stop: Path
    launchers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def noted(self) -> dict[Producer, tuple[str, Notes]]:
        """By rank of an attempt, its host and its notes."""
        found = {}
        for path in sorted(self.notes.glob("*")):
            if path.suffix == ".ended":
                continue
            run_id, rank, attempt, node, pid = path.name.split("-")
            ended = path.with_name(f"{path.name}.ended").exists()
            state = ENDED if ended else RUNNING if Path("/proc", pid).exists() else KILLED
            producer = Producer(run_id, int(rank), int(attempt) - 1, int(rank))
            found[producer] = node, read_notes(producer, path, state)
        return found

    @property
    def run_id(self) -> str:
        [run_id] = {producer.run_id for producer in self.noted()}
        return run_id

    def attempts(self) -> dict[int, set[int]]:
        """By attempt, the ranks that logged in it."""
        found: dict[int, set[int]] = {}
        for producer in self.noted():
            found.setdefault(producer.incarnation + 1, set()).add(producer.rank)
        return found

    def tell(self, word: str) -> None:
        making = self.stop.with_suffix(".making")
        making.write_text(word)
        making.rename(self.stop)


class Cluster:
    """Hosts with an agent each, to be used with `with`. hub: the flags of the first one's, others: those of
    the others'; without any, nobody starts them."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        hub: Sequence[str] | None = None,
        others: Sequence[str] = (),
    ) -> None:
        self.network = Network(names)
        self.base = short_folder()
        self.nodes: list[Node] = []
        self.jobs: list[Job] = []
        self.is_kept = False
        self._starts_agents = hub is not None
        for number, host in enumerate(self.network.hosts):
            base = self.base / host.name
            base.mkdir()
            folders = Folders.under(base)
            agent = AgentProcess(
                folders,
                *(others if number else hub or ()),
                command=host.command([str(COMMAND)]),
                variables={"TRACKAGENT_HEALTH": "silent_node"},
            )
            self.nodes.append(Node(host, base, folders, agent))

    def __enter__(self) -> Cluster:
        self.network.__enter__()
        try:
            with ThreadPoolExecutor() as threads:
                starting = self.nodes if self._starts_agents else ()
                list(threads.map(lambda node: node.agent.start(), starting))
        except BaseException:
            self.__exit__(BaseException)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        self.network.close()
        for process in self._processes():
            process.wait(DEADLINE_S)
        # Where something is wrong the logs and the stores say more.
        if kind is None and not self.is_kept:
            shutil.rmtree(self.base)

    def _processes(self) -> Iterable[subprocess.Popen[bytes]]:
        yield from (node.agent.process for node in self.nodes if node.agent.process is not None)
        for job in self.jobs:
            yield from job.launchers.values()

    @property
    def hub(self) -> Node:
        return self.nodes[0]

    def type(self, node: Node, commands: str) -> subprocess.Popen[bytes]:
        """Starts what somebody would type there, in the folder of the repository."""
        path = f"{COMMAND.parent}:{os.environ['PATH']}"
        variables = node.folders.environment | {"PATH": path, "OMP_NUM_THREADS": "1"}
        return self.network.run(node.host, ["sh", "-ec", commands], variables, node.output)

    def torchrun(self, *, ranks: int, restarts: int | None = None) -> Job:
        """Starts a job with so many ranks on each host. restarts: None: the nodes are given their numbers;
        else they find each other, and so often."""
        number = len(self.jobs)
        folder = self.base / f"job-{number}"
        job = Job(folder / "notes", folder / "stop")
        job.notes.mkdir(parents=True)
        self.jobs.append(job)
        for index, node in enumerate(self.nodes):
            where = f"{self.hub.host.address}:{PORT + number}"
            options = [f"--nnodes={len(self.nodes)}", f"--nproc-per-node={ranks}"]
            if restarts is None:
                address, _, port = where.partition(":")
                options += [f"--node-rank={index}", f"--master-addr={address}"]
                options += [f"--master-port={port}"]
            else:
                options += [f"--max-restarts={restarts}", "--rdzv-backend=c10d", "--rdzv-id=job"]
                options += [f"--rdzv-endpoint={where}", "--monitor-interval=0.5"]
            arguments = [str(job.notes), str(job.stop), str(PER_SECOND)]
            launcher = [sys.executable, "-m", "torch.distributed.run"]
            job.launchers[node.host.name] = self.network.run(
                node.host,
                [*launcher, *options, str(JOB), *arguments],
                node.folders.environment
                | {
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(ROOT),
                },
                node.output,
            )
        return job

    def wait_for_ranks(self, job: Job, count: int, attempt: int = 1) -> None:
        """Until so many ranks log in this attempt."""

        def log() -> bool:
            self._are_running(job)
            return len(job.attempts().get(attempt, ())) == count

        wait_until(log, f"{count} ranks log in attempt {attempt}", timeout_s=TORCHRUN_S)

    def _are_running(self, job: Job) -> None:
        for node in self.nodes:
            code = job.launchers[node.host.name].poll()
            said = node.output.read_text(errors="replace")[-3000:]
            assert code in (None, 0, -9), f"torchrun on {node.host.name}: {code}\n{said}"

    # --- what came of it

    def settle(self, job: Job, *, except_of: Iterable[Producer] = ()) -> list[Violation]:
        """What is wrong at the hub: what had been logged before this call must come in time. Of some nothing
        need come."""
        before = [noted for _, noted in job.noted().values()]
        known = {noted.producer for noted in before}
        gone = tuple(f"{producer}, " for producer in except_of)
        deadline = time.monotonic() + DEADLINE_S
        while True:
            stored = read_store(self.hub.folders.state / STORE_NAME, [job.run_id])
            now = {producer: noted for producer, (_, noted) in job.noted().items()}
            # Read after the store, so that whatever it holds had been begun.
            begun = [replace(old, begun=now[old.producer].begun) for old in before]
            later = [
                replace(noted, returned={}, state=RUNNING)
                for noted in now.values()
                if noted.producer not in known
            ]
            found = [
                violation
                for violation in check([*begun, *later], stored)
                if violation.kind != LOST or not violation.what.startswith(gone)
            ]
            lost = [violation for violation in found if violation.kind == LOST]
            if len(lost) < len(found) or not lost or time.monotonic() > deadline:
                return found
            time.sleep(LOOK_S)

    def end(self, job: Job) -> list[Violation]:
        """Tells all ranks to end, and says what is wrong when the launchers and all deliveries have."""
        job.tell("together")
        found = []
        for name, launcher in job.launchers.items():
            try:
                code = launcher.wait(TORCHRUN_S)
            except subprocess.TimeoutExpired:
                found.append(Violation(LATE, f"torchrun on {name} does not end"))
                continue
            if code != 0:
                found.append(Violation(LATE, f"torchrun on {name} ended with {code}"))
        found += self.left_behind(self.nodes)
        found += self.settle(job)
        run = self.run(job)
        if run is None or run.status != "finished":
            found.append(Violation(LATE, f"the run is not complete: {run}"))
        return found

    def run(self, job: Job) -> RunSummary | None:
        return self.hub.agent.run(job.run_id)

    def left_behind(self, nodes: Iterable[Node]) -> list[Violation]:
        """What should not be there any more when all is delivered, and still is after a while."""
        deadline = time.monotonic() + DEADLINE_S
        while (left := [what for node in nodes for what in _left(node)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(LOOK_S)
        return [Violation(LEFT_BEHIND, what) for what in left]


def _left(node: Node) -> list[str]:
    left = [str(path) for path in node.folders.journals()]
    left += [str(path) for base in node.folders for path in (base / "quarantine").glob("*")]
    left += [str(path) for path in (node.folders.state / "dead-letters").glob("*/*")]
    done = node.agent.run_cli("status", "--json", check=False)
    if done.returncode != 0:
        return [*left, f"no answer of the agent on {node.host.name}: {done.stderr}"]
    status = json.loads(done.stdout)
    if status["spool"]["batches"]:
        left.append(f"in the spool of {node.host.name}: {status['spool']}: {status['sinks']}")
    return left
