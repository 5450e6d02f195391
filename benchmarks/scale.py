"""A hub under the agents of many nodes: how long until a step can be asked for, and what that takes.

One process speaks for all nodes. It sends what their agents would, over a connection for each, with the
agents' own sink and from an address of its own, since a hub gives each host a share of itself; only what is
sent is made beforehand, since here it would take a core that the nodes have. Each gathers for a second, or
for as long as the hub wants it to, and sends all that has come meanwhile. All of it happens in a network
namespace, which needs root.
"""

from __future__ import annotations

import ctypes
import heapq
import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import psutil

from benchmarks.figures import (
    BenchmarkError,
    Figure,
    Node,
    NotOnThisMachine,
    node,
    outcome,
    start_worker,
    wait_for,
)

if TYPE_CHECKING:
    from trackagent.agent.store.contract import Batch

RANKS_A_NODE, METRICS = 8, 20
# Ranks, and for how long their agents gather, as they are set up (forward_interval_s).
SIZES = ((64, 1.0), (512, 1.0), (4096, 1.0), (4096, 10.0))
QUICK_SIZES = SIZES[:2]
STEPS, QUICK_STEPS = 30, 10
# Of the first steps nothing is said: connections are made then.
WARM_UP_STEPS = 20
THREADS = 64
# How long a record is on its way from a rank into its agent's spool: a sender's interval, and a commit.
LOCAL_S = 0.2
LOOK_S = 0.1
_CLONE_NEWNET = 0x40000000  # sched.h
BUDGET_S, BUDGET_MIB = 3.0, 1024.0
PROMISED = 4096, 1.0
KEYS = tuple(f"train/metric_{number}" for number in range(METRICS))


def measure(quick: bool) -> Iterator[Figure]:
    """For each of SIZES: METRICS metrics and one step a second, reduced on the nodes."""
    steps = QUICK_STEPS if quick else STEPS
    sizes = QUICK_SIZES if quick else SIZES
    _enter_network(max(sizes)[0] // RANKS_A_NODE)
    for ranks, interval_s in sizes:
        yield from _measure(ranks, interval_s, steps + WARM_UP_STEPS)


def _enter_network(nodes: int) -> None:
    """Gives this thread and its children a network with an address for each node. Who connects to an address
    of their own machine comes from there too."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        what = os.strerror(ctypes.get_errno())
        raise NotOnThisMachine(f"no network namespace for the nodes: {what} (it needs root)")
    commands = ["link set lo up", *(f"addr add {_address(n)}/32 dev lo" for n in range(nodes))]
    try:
        subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotOnThisMachine(f"no addresses for the nodes: {error} (install iproute2)") from None


def _address(number: int) -> str:
    """Of a node."""
    return f"10.88.{number // 250}.{number % 250 + 1}"


def _measure(ranks: int, interval_s: float, steps: int) -> Iterator[Figure]:
    with node(agent=True, collect="none", hub=True) as here:
        assert here.agent is not None
        run_id = uuid4().hex
        worker = start_worker("scale", here, [here.token_path, ranks, interval_s, steps, run_id])
        assert worker.stdout
        first_s = float(worker.stdout.readline())
        before, wire_before = here.agent.cpu_times(), _bytes_sent()
        delays, largest = _watch(here, run_id, ranks, steps, first_s)
        taken, after = time.time() - first_s, here.agent.cpu_times()
        sent = outcome(worker)
        on_the_wire = _bytes_sent() - wire_before
    promised = (ranks, interval_s) == PROMISED
    cpu_s = after.user + after.system - before.user - before.system
    counted = np.array(delays[WARM_UP_STEPS:])
    gathers = "" if interval_s == 1 else f", {interval_s:g} s between calls"
    told = f"{ranks:,} ranks on {ranks // RANKS_A_NODE} nodes{gathers}: "
    note = f"{len(counted)} steps; the slowest took {counted.max():.2f} s, the very first {delays[0]:.2f} s"
    yield Figure(name=f"{told}delay, median", value=float(np.median(counted)), unit="s", note=note)
    yield Figure(
        name=f"{told}delay, p99",
        value=float(np.quantile(counted, 0.99)),
        unit="s",
        budget=BUDGET_S if promised else None,
    )
    yield Figure(name=f"{told}hub's CPU", value=100 * cpu_s / taken, unit="% of a core")
    yield Figure(
        name=f"{told}hub's memory",
        value=largest / 2**20,
        unit="MiB",
        budget=BUDGET_MIB if promised else None,
    )
    points = ranks * METRICS * steps
    yield Figure(
        name=f"{told}on the wire",
        value=on_the_wire / points,
        unit="bytes a point",
        note=f"{sent['calls']:.0f} calls, {sent['call_ms']:.0f} ms each in the median, "
        f"{sent['worst_ms']:.0f} ms at worst",
    )


def _bytes_sent() -> int:
    """Of all in this network: of the nodes and the hub, with the headers of TLS, TCP and IP."""
    return int(psutil.net_io_counters().bytes_sent)


def _watch(
    here: Node, run_id: str, ranks: int, steps: int, first_s: float
) -> tuple[list[float], int]:
    """For each step, how long after it was logged all of its ranks were counted; and the hub's memory."""
    from trackagent.agent.store import open_reader
    from trackagent.agent.store.contract import NotFound, StoreError

    delays: dict[int, float] = {}
    largest = 0
    deadline = first_s + steps + 60
    wait_for(here.store_path.exists, "the hub has a store")
    reader = open_reader(here.store_path)
    try:
        while len(delays) < steps:
            if time.time() > deadline:
                raise BenchmarkError(f"after a minute {steps - len(delays)} steps are not complete")
            time.sleep(LOOK_S)
            assert here.agent is not None
            largest = max(largest, here.agent.memory_info().rss)
            try:
                found = reader.reduction(run_id, KEYS[0])
            except (NotFound, StoreError):
                continue
            now = time.time()
            for step in found.steps[found.count == ranks].tolist():
                delays.setdefault(step, now - (first_s + step))
    finally:
        reader.close()
    return [delays[step] for step in sorted(delays)], largest


# --- the nodes -------------------------------------------------------------------------------------


class Fleet:
    """`ranks` ranks of a run, RANKS_A_NODE on each node, and what the agents of these nodes send."""

    def __init__(self, token: Path, port: int, ranks: int, run_id: str) -> None:
        from trackagent.agent import hubkey, tls
        from trackagent.agent.policies import Policies
        from trackagent.agent.reducing import Reducer
        from trackagent.agent.sinks.forward import ForwardSink

        secret = hubkey.read_token(token)
        pin = hubkey.pin_of_token(secret)
        self.ranks, self._run_id = ranks, run_id
        self.nodes = ranks // RANKS_A_NODE
        self.origins = [secrets.token_hex(16) for _ in range(self.nodes)]
        self._reducer = Reducer(policies=Policies(), keep_all_ranks=0, stores=False)

        def sink(number: int) -> ForwardSink:
            address = f"{_address(number)}:{port}"
            return ForwardSink(
                "upstream",
                lambda: (address, tls.channel(address, pin=pin)),
                headers=[("authorization", f"Bearer {secret}")],
                node=f"node-{number}",
            )

        self.sinks = [sink(number) for number in range(self.nodes)]

    def batches(self, number: int, steps: int, first_s: float) -> Iterator[Batch]:
        """What the agent of a node has to say in each second."""
        from trackagent.agent.store.contract import Batch, BatchId, Points, ProducerInfo

        infos = [
            ProducerInfo(
                uuid4().bytes,
                self._run_id,
                1,
                number * RANKS_A_NODE + local,
                local,
                self.ranks,
                f"node-{number}",
                1000 + local,
                int(first_s * 1e9),
                "scale",
                "",
                False,
                int(first_s * 1e9),
            )
            for local in range(RANKS_A_NODE)
        ]
        noise = np.random.default_rng(number)
        for step in range(steps):
            at = np.array([step]), np.array([int((first_s + step) * 1e9)])
            points = [
                Points(info.producer_id, KEYS, *at, noise.random((METRICS, 1))) for info in infos
            ]
            batch = Batch(
                BatchId(self.origins[number], step + 1, step + 1),
                infos,
                points=points,
                metric_records={info.producer_id: 1 for info in infos},
            )
            yield self._reducer.reduced(batch)


def _worker(
    token: Path, port: int, ranks: int, interval_s: float, steps: int, run_id: str
) -> dict[str, float]:
    """Sends each step in its second; prints when the first one is, seconds since 1970."""
    fleet = Fleet(token, port, ranks, run_id)
    began, trial = time.perf_counter(), 50
    for _ in fleet.batches(0, trial, time.time()):
        pass
    a_batch_s = 2 * (time.perf_counter() - began) / trial  # and its encoding
    first_s = time.time() + 3 + a_batch_s * fleet.nodes * steps
    made = [list(fleet.batches(number, steps, first_s)) for number in range(fleet.nodes)]
    first_s = max(first_s, time.time() + 1)
    print(first_s, flush=True)
    taken: list[float] = []

    def send(numbers: Iterable[int]) -> None:
        """What these nodes send, as each is due."""
        # Agents do not send at the same moment.
        due = [(first_s + LOCAL_S + number / fleet.nodes, number, 0) for number in numbers]
        while due:
            due_s, number, sent = heapq.heappop(due)
            time.sleep(max(0.0, due_s - time.time()))
            began = time.time()
            now = min(steps, 1 + int(began - first_s - LOCAL_S))
            batch = _together(made[number][sent:now])
            if batch is not None:
                fleet.sinks[number].deliver(batch)
                taken.append(time.time() - began)
            if now < steps:
                gather_s = max(interval_s, fleet.sinks[number].gather_s)
                heapq.heappush(due, (began + gather_s, number, now))

    with ThreadPoolExecutor(THREADS) as senders:
        turns = [range(first, fleet.nodes, THREADS) for first in range(min(THREADS, fleet.nodes))]
        for done in [senders.submit(send, numbers) for numbers in turns]:
            done.result()
    for sink in fleet.sinks:
        sink.close()
    return {
        "calls": len(taken),
        "call_ms": 1e3 * float(np.median(taken)),
        "worst_ms": 1e3 * max(taken),
    }


def _together(batches: Sequence[Batch]) -> Batch | None:
    """One batch of those of several seconds."""
    if not batches:
        return None
    records: Counter[bytes] = Counter()
    for batch in batches:
        records.update(batch.metric_records)
    return replace(
        batches[0],
        id=replace(batches[0].id, last=batches[-1].id.last),
        points=[points for batch in batches for points in batch.points],
        metric_records=dict(records),
    )


def _main(arguments: Sequence[str]) -> None:
    token, ranks, interval_s, steps, run_id = arguments
    # The nodes' threads wait; what is slow here must not be taken for the hub's slowness.
    psutil.Process().nice(5)
    hub = json.loads((Path(os.environ["TRACKAGENT_DIR"]) / "hub.json").read_text())
    port = int(hub["address"].rpartition(":")[2])
    result = _worker(Path(token), port, int(ranks), float(interval_s), int(steps), run_id)
    print(json.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1:])
