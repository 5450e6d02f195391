"""What the agent takes from its node beside a steady job: CPU and memory."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import psutil

from benchmarks.figures import Figure, node, outcome, start_worker

RANKS, METRICS, RATE_HZ = 8, 50, 10
SECONDS, QUICK_SECONDS, WARM_UP_S = 30.0, 10.0, 3.0
BUDGET_PERCENT, BUDGET_MIB = 5.0, 120.0
SAMPLE_S = 0.5


def measure(quick: bool) -> Iterator[Figure]:
    """CPU and memory while RANKS ranks log METRICS metrics at RATE_HZ: with every collector, which is what
    was promised, without any, and as in a run of very many ranks."""
    seconds = QUICK_SECONDS if quick else SECONDS
    yield from _measure(seconds, "all", "every collector on", promised=True)
    yield from _measure(seconds, "none", "no collectors", promised=False)
    flags = ("--keep-all-ranks=0",)
    what = "no collectors, reductions and extremes kept"
    yield from _measure(seconds, "none", what, promised=False, flags=flags)


def _measure(
    seconds: float, collect: str, what: str, *, promised: bool, flags: Sequence[str] = ()
) -> Iterator[Figure]:
    with node(agent=True, collect=collect, flags=flags) as here:
        assert here.agent is not None
        run_id = uuid4().hex
        workers = []
        for rank in range(RANKS):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS}
            more = {name: str(value) for name, value in place.items()}
            more["TRACKAGENT_RUN_ID"] = run_id
            workers.append(start_worker("agent", here, [rank], more=more))
        for worker in workers:
            assert worker.stdout
            worker.stdout.readline()
        time.sleep(WARM_UP_S)
        before, began, largest = here.agent.cpu_times(), time.perf_counter(), 0
        of_threads = _of_threads(here.agent)
        while (taken := time.perf_counter() - began) < seconds:
            time.sleep(min(SAMPLE_S, seconds - taken))
            largest = max(largest, here.agent.memory_info().rss)
        taken, after = time.perf_counter() - began, here.agent.cpu_times()
        shares = _of_threads(here.agent)
        shares.subtract(of_threads)
        for worker in workers:
            assert worker.stdin
            worker.stdin.close()
            worker.stdin = None
        logged = [outcome(worker) for worker in workers]
    user, system = after.user - before.user, after.system - before.system
    yield Figure(
        name=f"CPU, {what}",
        value=100 * (user + system) / taken,
        unit="% of a core",
        budget=BUDGET_PERCENT if promised else None,
        note=f"user {100 * user / taken:.1f}, system {100 * system / taken:.1f}, over {taken:.0f} s; "
        f"{sum(logged)} records; "
        + ", ".join(f"{name} {share / shares.total():.0%}" for name, share in shares.most_common()),
    )
    yield Figure(
        name=f"resident memory, {what}",
        value=largest / 2**20,
        unit="MiB",
        budget=BUDGET_MIB if promised else None,
        note="the largest of two samples a second",
    )


def _of_threads(agent: psutil.Process) -> Counter[str]:
    """Seconds of CPU so far, by what the agent's threads are: Python's have the process's name, gRPC's own
    have theirs."""
    tasks = Path(f"/proc/{agent.pid}/task")
    own = (tasks / str(agent.pid) / "comm").read_text()
    found: Counter[str] = Counter()
    for thread in agent.threads():
        name = "the event loop's thread"
        if thread.id != agent.pid:
            try:
                python = (tasks / str(thread.id) / "comm").read_text() == own
            except FileNotFoundError:
                continue  # it has ended meanwhile
            name = "Python's others" if python else "gRPC's own"
        found[name] += thread.user_time + thread.system_time
    return found


def _worker(rank: int) -> int:
    """Logs until its standard input is closed; how many records."""
    import select

    from trackagent import client

    run = client.init("bench")
    print("ready", flush=True)
    began, step = time.perf_counter(), 0
    while True:
        wait_s = max(0.0, began + step / RATE_HZ - time.perf_counter())
        if select.select([sys.stdin], [], [], wait_s)[0]:
            break
        metrics = {f"train/metric_{i}": 1.0 / (step + i + rank + 1) for i in range(METRICS)}
        run.log(metrics, step)
        step += 1
    run.finish()
    return step


if __name__ == "__main__":
    print(json.dumps(_worker(int(sys.argv[1]))))
