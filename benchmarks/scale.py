"""A hub under the agents of many nodes: how long until a step can be asked for, and what that takes.

One process speaks for all nodes. It sends what their agents would, over a connection for each, with the
agents' own sink; only what is sent is made beforehand, since here it would take a core that the nodes have.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import psutil

from benchmarks.figures import (
    BenchmarkError,
    Figure,
    Node,
    node,
    outcome,
    start_worker,
    wait_for,
)

if TYPE_CHECKING:
    from trackagent.agent.store.contract import Batch

RANKS_A_NODE, METRICS = 8, 20
SIZES, QUICK_SIZES = (64, 512, 4096), (64, 512)
STEPS, QUICK_STEPS = 30, 10
# Of the first steps nothing is said: connections are made then.
WARM_UP_STEPS = 3
THREADS = 32
LOOK_S = 0.25
BUDGET_S, BUDGET_MIB = 3.0, 1024.0
PROMISED = 4096
KEYS = tuple(f"train/metric_{number}" for number in range(METRICS))


def measure(quick: bool) -> Iterator[Figure]:
    """For each number of ranks: METRICS metrics and one step a second, reduced on the nodes."""
    steps = QUICK_STEPS if quick else STEPS
    for ranks in QUICK_SIZES if quick else SIZES:
        yield from _measure(ranks, steps + WARM_UP_STEPS)


def _measure(ranks: int, steps: int) -> Iterator[Figure]:
    with node(agent=True, collect="none", hub=True) as here:
        assert here.agent is not None
        run_id = uuid4().hex
        worker = start_worker("scale", here, [here.token_path, ranks, steps, run_id])
        assert worker.stdout
        first_s = float(worker.stdout.readline())
        before = here.agent.cpu_times()
        delays, largest = _watch(here, run_id, ranks, steps, first_s)
        taken, after = time.time() - first_s, here.agent.cpu_times()
        sent = outcome(worker)
    promised = ranks == PROMISED
    cpu_s = after.user + after.system - before.user - before.system
    counted = np.array(delays[WARM_UP_STEPS:])
    told = f"{ranks:,} ranks on {ranks // RANKS_A_NODE} nodes: "
    note = f"{len(counted)} steps, of which all ranks are counted; the slowest took {counted.max():.2f} s"
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
        value=sent["bytes"] / points,
        unit="bytes a point",
        note=f"a node's call of a second took {sent['call_ms']:.0f} ms in the median, "
        f"{sent['worst_ms']:.0f} ms at worst",
    )


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

    def __init__(self, token: Path, address: str, ranks: int, run_id: str) -> None:
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
        self.sinks = [
            ForwardSink(
                "upstream",
                lambda: (address, tls.channel(address, pin=pin)),
                grants=lambda runs: {},
                authorization=f"Bearer {secret}",
                node=f"node-{number}",
            )
            for number in range(self.nodes)
        ]

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


def _worker(token: Path, address: str, ranks: int, steps: int, run_id: str) -> dict[str, float]:
    """Sends each step in its second; prints when the first one is, seconds since 1970."""
    from trackagent.agent.wire import encode

    fleet = Fleet(token, address, ranks, run_id)
    began, trial = time.perf_counter(), 50
    for _ in fleet.batches(0, trial, time.time()):
        pass
    a_batch_s = 2 * (time.perf_counter() - began) / trial  # and its encoding
    first_s = time.time() + 3 + a_batch_s * fleet.nodes * steps
    made = [list(fleet.batches(number, steps, first_s)) for number in range(fleet.nodes)]
    size = sum(len(encode(batch)) for of_node in made for batch in of_node)
    first_s = max(first_s, time.time() + 1)
    print(first_s, flush=True)
    taken: list[float] = []

    def send(number: int, step: int) -> None:
        # Agents do not send at the same moment.
        time.sleep(max(0.0, first_s + step + number / fleet.nodes - time.time()))
        began = time.perf_counter()
        fleet.sinks[number].deliver(made[number][step])
        taken.append(time.perf_counter() - began)

    with ThreadPoolExecutor(THREADS) as senders:
        for done in [senders.submit(send, n, s) for s in range(steps) for n in range(fleet.nodes)]:
            done.result()
    for sink in fleet.sinks:
        sink.close()
    return {
        "bytes": size,
        "call_ms": 1e3 * float(np.median(taken)),
        "worst_ms": 1e3 * max(taken),
    }


def _main(arguments: Sequence[str]) -> None:
    token, ranks, steps, run_id = arguments
    # The nodes' threads wait; what is slow here must not be taken for the hub's slowness.
    psutil.Process().nice(5)
    hub = json.loads((Path(os.environ["TRACKAGENT_DIR"]) / "hub.json").read_text())
    result = _worker(Path(token), hub["address"], int(ranks), int(steps), run_id)
    print(json.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1:])
