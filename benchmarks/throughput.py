"""How fast records travel all the way: from `log()` in several processes to durable and readable in
the store.

The clock runs from the first `log()` of any process until a reader of the store sees every point.
Afterwards every point is read back and compared with what was logged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from uuid import uuid4

import numpy as np

from benchmarks.figures import BenchmarkError, Figure, Node, node, outcome, start_worker, wait_for
from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import NotFound, StoreError

PROCESSES, VALUES = 4, 10
RECORDS, QUICK_RECORDS = 100_000, 20_000
BUDGET_POINTS_A_S = 500_000.0


def measure(quick: bool) -> Iterator[Figure]:
    """Points a second, with PROCESSES processes that log as fast as they can."""
    records = QUICK_RECORDS if quick else RECORDS
    points = PROCESSES * records * VALUES
    with node(agent=True) as here:
        assert here.agent is not None
        run_id = uuid4().hex
        workers = [_start(here, run_id, rank, records) for rank in range(PROCESSES)]
        for worker in workers:
            assert worker.stdout
            worker.stdout.readline()
        before = here.agent.cpu_times()
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()

        def stored() -> bool:
            if any(worker.poll() for worker in workers):
                raise BenchmarkError("a process that logs has failed")
            return _readable(here, run_id) == points

        wait_for(stored, "every point is in the store")
        end = time.time()
        after = here.agent.cpu_times()
        memory = here.agent.memory_info().rss / 2**20
        logged = [outcome(worker) for worker in workers]
        _compare(here, run_id, records)
    taken = end - min(one["began"] for one in logged)
    agent_s = after.user + after.system - before.user - before.system
    yield Figure(
        name=f"{PROCESSES} processes, {VALUES} floats a record",
        value=points / taken,
        unit="points/s",
        budget=BUDGET_POINTS_A_S,
        at_least=True,
        note=f"{points} points in {taken:.1f} s; the processes logged for "
        f"{max(one['logging_s'] for one in logged):.1f} s and took "
        f"{sum(one['cpu_s'] for one in logged):.1f} s of CPU, the agent {agent_s:.1f} s and {memory:.0f} MiB",
    )


def _start(here: Node, run_id: str, rank: int, records: int) -> subprocess.Popen[str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "TRACKAGENT_RUN_ID": run_id}
    more = {name: str(value) for name, value in place.items()}
    return start_worker("throughput", here, [rank, records], more=more)


def _readable(here: Node, run_id: str) -> int:
    """Points that a reader sees now."""
    time.sleep(0.03)
    try:
        reader = open_reader(here.store_path)
        try:
            return reader.run(run_id).points
        finally:
            reader.close()
    except (NotFound, StoreError):
        return 0


def _compare(here: Node, run_id: str, records: int) -> None:
    """BenchmarkError unless the store holds exactly what the workers logged."""
    reader = open_reader(here.store_path)
    try:
        for rank in range(PROCESSES):
            for number, value in enumerate(_values(rank)):
                series = reader.series(run_id, f"train/metric_{number}", f"rank {rank}")
                steps = np.arange(records)
                if not np.array_equal(series.steps, steps) or (series.values != value).any():
                    raise BenchmarkError(f"rank {rank} metric {number} is not what was logged")
    finally:
        reader.close()


def _values(rank: int) -> list[float]:
    return [rank + 1 / (number + 3) for number in range(VALUES)]


def _worker(rank: int, records: int) -> dict[str, float]:
    from trackagent import client

    run = client.init("bench")
    metrics = {f"train/metric_{number}": value for number, value in enumerate(_values(rank))}
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, began, start = time.process_time(), time.time(), time.perf_counter()
    for step in range(records):
        run.log(metrics, step)
    logging_s = time.perf_counter() - start
    if not run.finish():
        raise SystemExit("not everything was delivered in time")
    return {"began": began, "logging_s": logging_s, "cpu_s": time.process_time() - cpu}


if __name__ == "__main__":
    print(json.dumps(_worker(int(sys.argv[1]), int(sys.argv[2]))))
