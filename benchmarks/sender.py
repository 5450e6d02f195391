"""What the sender takes from the training process: its CPU time at a steady rate of log calls.

The same loop runs in processes with the client and without it; the difference is what the client
costs, `log()` included. The kernel's own account of each thread then says where it went."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, node, outcome, start_worker

RATE_HZ, VALUES = 200, 10
WARM_UP_S, SECONDS, QUICK_SECONDS = 1.5, 15.0, 5.0
BUDGET_PERCENT = 1.0


def measure(quick: bool) -> Iterator[Figure]:
    """Percent of a core at RATE_HZ records a second."""
    seconds = QUICK_SECONDS if quick else SECONDS
    with node(agent=True) as here:
        # Both at once, so that they meet the same machine.
        workers = [
            start_worker("sender", here, [seconds, client]) for client in ("with", "without")
        ]
        tracked, bare = map(outcome, workers)
    cost = {name: 100 * (tracked[name] - bare.get(name, 0.0)) / seconds for name in tracked}
    process, logging = cost.pop("process"), cost.pop("MainThread")
    threads = ", ".join(f"{name} {share:.2f}" for name, share in sorted(cost.items()))
    yield Figure(
        name="client in all",
        value=process,
        unit="% of a core",
        budget=BUDGET_PERCENT,
        note=f"on the caller's thread {logging:.2f}; {threads}",
    )


def _worker(seconds: float, tracked: bool) -> dict[str, float]:
    """CPU seconds of the process and of each of its threads, by name, while it logged for `seconds`."""
    log = None
    if tracked:
        from trackagent import client

        log = client.init("bench").log
    metrics = {f"train/metric_{i}": 1.0 / (i + 3) for i in range(VALUES)}
    _loop(metrics, log, WARM_UP_S)
    before, before_all = _threads(), time.process_time()
    _loop(metrics, log, seconds)
    after_all, after = time.process_time(), _threads()
    spent = {"process": after_all - before_all}
    for identity, (name, taken) in after.items():
        spent[name] = spent.get(name, 0.0) + taken - before.get(identity, (name, 0.0))[1]
    return spent


def _loop(metrics, log, seconds: float) -> None:  # type: ignore[no-untyped-def]
    began = time.perf_counter()
    for step in range(round(seconds * RATE_HZ)):
        time.sleep(max(0.0, began + step / RATE_HZ - time.perf_counter()))
        if log is not None:
            log(metrics, step)


def _threads() -> dict[int, tuple[str, float]]:
    """Thread id → name and CPU seconds."""
    ours = {thread.native_id: thread.name for thread in threading.enumerate()}
    found = {}
    for task in Path("/proc/self/task").iterdir():
        # Nanoseconds on a CPU, waiting for one, and how often.
        taken = int((task / "schedstat").read_text().split()[0]) / 1e9
        found[int(task.name)] = (ours.get(int(task.name), "gRPC's own"), taken)
    return found


if __name__ == "__main__":
    print(json.dumps(_worker(float(sys.argv[1]), sys.argv[2] == "with")))
