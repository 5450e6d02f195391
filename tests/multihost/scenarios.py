"""What happens to the hosts, and what the hub must hold after it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from tests.chaos.oracle import LATE, LOST, WRONG, Violation, check, read_store
from tests.chaos.records import KILLED, RUNNING, Metrics, record
from tests.fakes import DEADLINE_S, TORCHRUN_S, wait_until
from tests.multihost.cluster import ROOT, Cluster, Job, Node
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import Event

Say = Callable[[str], None]

SHOWN_VIOLATIONS = 10
HOSTS = ("a", "b", "c")
RANKS = 2
SIZE = f"{len(HOSTS)} x {RANKS}"
PARTITION_S = 20.0
# How long the hub waits before it says that a node is silent: a few of the partition's seconds.
SILENT_S = 8.0
FLAGS = ("--forward-interval-s=0.2", "--deliver-interval-s=0.1")
HUB = ("--listen=:7717", f"--silent-s={SILENT_S:g}", *FLAGS)


@dataclass
class Result:
    """What came of a fault. records: logged by then since the fault before; recovered_s: from the fault's end
    until all that had been logged by then was at the hub."""

    fault: str
    size: str
    records: int = 0
    recovered_s: float = 0.0
    violations: list[Violation] = field(default_factory=list)


class _Told:
    """The results of one job's faults, one after the other."""

    def __init__(self, cluster: Cluster, job: Job, size: str, say: Say) -> None:
        self._cluster, self._job, self._size, self._say = cluster, job, size, say
        self._logged = 0
        self.results: list[Result] = []

    def after(self, fault: str, settle: Callable[[], list[Violation]] | None = None) -> Result:
        """Waits until the hub has what was logged until now."""
        began = time.monotonic()
        logged = sum(len(noted.begun) for _, noted in self._job.noted().values())
        violations = settle() if settle else self._cluster.settle(self._job)
        took_s = time.monotonic() - began
        result = Result(fault, self._size, logged - self._logged, took_s, violations)
        self._logged = logged
        self.results.append(result)
        self._cluster.is_kept = self._cluster.is_kept or bool(violations)
        self._say(f"{fault}: {'wrong' if violations else 'fine'} after {took_s:.1f} s")
        return result


def faults_of_a_job(say: Say) -> list[Result]:
    """One job under torchrun, its nodes numbered; hosts, the network and agents fail under it in turn."""
    with Cluster(HOSTS, hub=HUB, others=FLAGS) as cluster:
        _, b, c = cluster.nodes
        job = cluster.torchrun(ranks=RANKS)
        cluster.wait_for_ranks(job, len(HOSTS) * RANKS)
        told = _Told(cluster, job, SIZE, say)
        _wait_for_records(job, 200)
        told.after("none")

        cluster.network.partition(c.host)
        say(f"{c.host.name} is cut off for {PARTITION_S:g} s")
        began = _newest(job, c)
        silent = _wait_for_event(cluster, job, f"nothing has come from node {c.host.name}")
        wait_until(lambda: _newest(job, c) - began > PARTITION_S * 1e9, "its ranks go on")
        cluster.network.rejoin(c.host)
        partition = told.after(f"host cut off for {PARTITION_S:g} s")
        partition.violations += silent

        cluster.network.disturb(b.host, delay_s=0.05, jitter_s=0.02, loss=0.05)
        _wait_for_records(job, 300)
        told.after("5 % of packets lost, others 50 to 70 ms late, out of order")
        cluster.network.rejoin(b.host)

        cluster.hub.agent.kill()
        _wait_for_records(job, 200)
        cluster.hub.agent.start()
        told.after("hub killed, started again")

        b.agent.kill()
        _wait_for_records(job, 200)
        b.agent.start()
        told.after("agent of another host killed, started again")

        told.after("job ends", lambda: cluster.end(job))
        return told.results


def restart_and_loss(say: Say) -> list[Result]:
    """One elastic job: a rank dies, so that all begin again as attempt 2; then a host is lost for good."""
    with Cluster(HOSTS, hub=HUB, others=FLAGS) as cluster:
        _, b, c = cluster.nodes
        everyone = set(range(len(HOSTS) * RANKS))
        job = cluster.torchrun(ranks=RANKS, restarts=3)
        cluster.wait_for_ranks(job, len(everyone))
        _wait_for_records(job, 100)
        _kill_a_rank(job, b)
        cluster.wait_for_ranks(job, len(everyone), attempt=2)
        told = _Told(cluster, job, SIZE, say)
        result = told.after("rank killed, torchrun restarts all")
        if job.attempts() != {1: everyone, 2: everyone}:
            result.violations.append(Violation(WRONG, f"attempts and ranks: {job.attempts()}"))

        cluster.network.partition(c.host)
        _wait_for_records(job, 1)  # which are never sent
        cluster.network.kill(c.host)
        said = _wait_for_event(cluster, job, f"nothing has come from node {c.host.name}")
        job.tell("alone")
        lost = told.after("host lost for good", lambda: [*said, *_check_survivors(cluster, job, c)])
        missing, wrong = _check_lost(cluster, job, c)
        lost.violations += wrong
        lost.fault = f"host lost for good, {missing} records with it, which are named"
        return told.results


def nobody_listens(say: Say) -> list[Result]:
    """No agent takes what others have: rank 0 says so, and each node keeps its own."""
    with Cluster(HOSTS[:2], hub=FLAGS, others=FLAGS) as cluster:
        job = cluster.torchrun(ranks=1)
        cluster.wait_for_ranks(job, 2)
        told = _Told(cluster, job, "2 x 1", say)
        _wait_for_records(job, 100)
        job.tell("together")
        told.after("hub without --listen", lambda: _check_apart(cluster, job))
        return told.results


def example(say: Say) -> list[Result]:
    """The commands of examples/multinode/README.md as they stand there."""
    readme = (ROOT / "examples" / "multinode" / "README.md").read_text()
    on_1, on_2, look, stop = re.findall(r"^```sh\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    with Cluster(["node-1", "node-2"]) as cluster:
        first, second = cluster.nodes
        jobs = [cluster.type(first, on_1), cluster.type(second, on_2)]
        wrong = [f"{job.args}: {code}" for job in jobs if (code := job.wait(2 * TORCHRUN_S))]
        wait_until(
            lambda: [run["status"] for run in first.agent.runs()] == ["finished"],
            "the run is complete",
        )
        for node, commands in ((first, look), (second, stop), (first, stop)):
            code = cluster.type(node, commands).wait(DEADLINE_S)
            wrong += [f"{commands}: {code}"] * bool(code)
        said = [node.output.read_text() for node in cluster.nodes]
        (run,) = first.agent.runs()
        if (run["ranks"], run["records_stored"], second.agent.runs()) != (4, 800, []):
            wrong.append(f"what is stored: {run}; on the other: {second.agent.runs()}")
        violations = [Violation(WRONG, f"{what}\n{said}") for what in wrong]
        say("wrong" if violations else "fine")
        return [Result("none: examples/multinode", "2 x 2", run["records_stored"], 0.0, violations)]


SCENARIOS: dict[str, Callable[[Say], list[Result]]] = {
    "faults": faults_of_a_job,
    "restart": restart_and_loss,
    "apart": nobody_listens,
    "example": example,
}


def carry_out(name: str) -> list[Result]:
    """Lets one of them happen, and prints what goes on."""

    def say(text: str) -> None:
        print(f"{name}: {text}", flush=True)  # noqa: T201 - shown while it goes on

    try:
        found = SCENARIOS[name](say)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        found = [Result(name, "", violations=[Violation(LATE, str(error))])]
    for result in found:
        for violation in result.violations[:SHOWN_VIOLATIONS]:
            say(f"{result.fault}: {violation.kind}: {violation.what}")
        if (more := len(result.violations) - SHOWN_VIOLATIONS) > 0:
            say(f"{result.fault}: and {more} more")
    return found


def _wait_for_records(job: Job, more: int) -> None:
    """Until each rank that runs has logged so many more."""
    before = {producer: len(noted.returned) for producer, (_, noted) in job.noted().items()}

    def logged() -> bool:
        now = job.noted()
        return all(
            len(now[producer][1].returned) - count >= more or now[producer][1].state == KILLED
            for producer, count in before.items()
        )

    wait_until(logged, f"every rank logs {more} records more")


def _newest(job: Job, node: Node) -> int:
    """When a rank of the node logged last, in nanoseconds."""
    return max(
        max(noted.returned.values(), default=0)
        for name, noted in job.noted().values()
        if name == node.host.name
    )


def _kill_a_rank(job: Job, node: Node) -> None:
    [pid, *_] = [
        int(path.name.split("-")[4])
        for path in job.notes.iterdir()
        if path.name.split("-")[3] == node.host.name
    ]
    os.kill(pid, signal.SIGKILL)


def _wait_for_event(cluster: Cluster, job: Job, message: str) -> list[Violation]:
    """Until an event of the run at the hub begins so; what is wrong when none comes."""
    try:
        wait_until(lambda: _events(cluster, job, message), f"an event says: {message} …")
    except AssertionError as error:
        return [Violation(LATE, str(error))]
    return []


def _events(cluster: Cluster, job: Job, message: str) -> list[Event]:
    """The run's at the hub that begin so."""
    with closing(open_reader(cluster.hub.folders.state / STORE_NAME)) as reader:
        return [event for event in reader.events(job.run_id) if event.message.startswith(message)]


def _check_survivors(cluster: Cluster, job: Job, lost: Node) -> list[Violation]:
    """What is wrong with the others' ranks once they have ended."""
    wait_until(
        lambda: all(noted.state != RUNNING for _, noted in job.noted().values()),
        "the ranks of the other hosts have ended",
    )
    others = [node for node in cluster.nodes if node is not lost]
    gone = [producer for producer, (name, _) in job.noted().items() if name == lost.host.name]
    return cluster.left_behind(others) + cluster.settle(job, except_of=gone)


def _check_lost(cluster: Cluster, job: Job, lost: Node) -> tuple[int, list[Violation]]:
    """How many records of a lost host are missing, and what is wrong: only the last ones of its ranks may be,
    and an event must say up to which step they are there."""
    stored = read_store(cluster.hub.folders.state / STORE_NAME, [job.run_id])[job.run_id]
    [event] = _events(cluster, job, f"nothing has come from node {lost.host.name}")
    named = dict(zip(event.data["ranks"], event.data["last_steps"], strict=True))
    missing, wrong = 0, []
    for producer, (name, noted) in job.noted().items():
        if name != lost.host.name or producer.incarnation != max(job.attempts()) - 1:
            continue
        steps = {point.step for point in stored.points if point.source == producer.source}
        last = max(steps, default=-1)
        if named.get(producer.rank) != last:
            wrong.append(Violation(WRONG, f"{producer} came to step {last}, and not as {event}"))
        metrics = [record(producer, number) for number in sorted(noted.returned)]
        gone = {one.step for one in metrics if isinstance(one, Metrics)} - steps
        missing += len(gone)
        wrong += [Violation(LOST, f"{producer}, step {step}") for step in gone if step < last]
        if not gone:
            wrong.append(Violation(WRONG, f"{producer} had sent everything: nothing was tested"))
    return missing, wrong


def _check_apart(cluster: Cluster, job: Job) -> list[Violation]:
    """What is wrong with a run of which each node keeps its part."""
    for launcher in job.launchers.values():
        launcher.wait(TORCHRUN_S)
    found = cluster.left_behind(cluster.nodes)
    for node in cluster.nodes:
        mine = [noted for name, noted in job.noted().values() if name == node.host.name]
        found += check(mine, read_store(node.folders.state / STORE_NAME, [job.run_id]))
    said = cluster.hub.output.read_text()
    sentences = [line for line in said.splitlines() if "`trackagent start --listen ADDR`" in line]
    if len(sentences) != 1:
        found.append(Violation(WRONG, f"rank 0 does not say once what is missing: {said[-2000:]}"))
    return found
