"""What `log()` costs the thread that calls it, beside its floor: packing the same bytes into mapped memory.

Both are timed call by call, alternately, in one process, so that both meet the same caches, clock rates
and neighbours; what reading the clock around an empty call takes is taken off every time. Paced: with
5 ms of sleep before each call, when caches have cooled, as between the steps of a training; an empty call
then shows what that alone does.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.figures import Figure, node, outcome, start_worker

VALUES = 10
PACE_S = 0.005
FULL_SPEED_CALLS, PACED_CALLS, SLOW_CALLS = 100_000, 1_000, 20_000
BUDGET_RATIO, BUDGET_P99_US = 3.0, 10.0

RECORD = struct.Struct(f"<IIBBHIqq{VALUES}d")


def measure(quick: bool) -> Iterator[Figure]:
    """Figures of `log()` with the agent running and without one."""
    for agent in (True, False):
        where = "agent" if agent else "no agent"
        with node(agent=agent) as here:
            found = outcome(start_worker("log_call", here, [int(quick), int(agent)]))
        for pace in PACES:
            log, floor, nothing = (found[f"{what}, {pace}"] for what in ("log", "floor", "nothing"))
            yield Figure(
                name=f"{pace}, {where}: median over the floor's",
                value=log["p50"] / floor["p50"],
                unit="x",
                budget=BUDGET_RATIO,
                note=f"{log['p50']:.2f} µs, the floor {floor['p50']:.2f}, an empty call {nothing['p50']:.2f}",
            )
            yield Figure(
                name=f"{pace}, {where}: p99",
                value=log["p99"],
                unit="µs",
                budget=BUDGET_P99_US,
                note=f"the floor {floor['p99']:.1f}, an empty call {nothing['p99']:.1f}; "
                f"p95 {log['p95']:.1f}, max {log['max']:.0f}, the floor's max {floor['max']:.0f}",
            )
        if agent:
            for case in CASES:
                cost = found[case]
                yield Figure(
                    name=f"{case}: median",
                    value=cost["p50"],
                    unit="µs",
                    note=f"p95 {cost['p95']:.1f}, p99 {cost['p99']:.1f}, max {cost['max']:.0f}",
                )


PACES = {"full speed": (FULL_SPEED_CALLS, 0.0), "paced 5 ms": (PACED_CALLS, PACE_S)}
CASES = (
    "10 floats and a timestamp",
    "9 floats and a 0-d CPU tensor",
    "10 0-d CPU tensors",
    "timer() around nothing",
)


def _worker(quick: bool, tensors: bool) -> dict[str, dict[str, float]]:
    from trackagent import client

    # Without an agent nothing is delivered, which needs no saying here.
    logging.getLogger("trackagent").setLevel(logging.ERROR)
    run = client.init("bench")
    metrics = {f"train/metric_{i}": math.sin(i) * 10**i for i in range(VALUES)}
    memory = mmap.mmap(-1, 1 << 20)
    pack_into, size = RECORD.pack_into, RECORD.size
    now = time.time_ns()

    def floor(step: int) -> None:
        pack_into(
            memory, (step & 8191) << 7, size, 0, 2, 0, 1, VALUES, step, now, *metrics.values()
        )

    def log(step: int) -> None:
        run.log(metrics, step)

    share = 5 if quick else 1
    found = {}
    for pace, (calls, pause_s) in PACES.items():
        times = _timed([_nothing, floor, log], calls // share, pause_s)
        spreads = zip(("nothing", "floor", "log"), map(_spread, times), strict=True)
        found |= {f"{what}, {pace}": spread for what, spread in spreads}
    if tensors:
        import torch

        one = {**metrics, "train/metric_0": torch.tensor(0.5)}
        ten = {key: torch.tensor(value) for key, value in metrics.items()}
        cases: list[Callable[[int], Any]] = [
            lambda step: run.log(metrics, step, time.time()),
            lambda step: run.log(one, step),
            lambda step: run.log(ten, step),
            lambda _: _time_nothing(client),
        ]
        times = _timed(cases, SLOW_CALLS // share, 0.0)
        found |= dict(zip(CASES, map(_spread, times), strict=True))
    run.finish()
    return found


def _nothing(_: int) -> None:
    pass


def _time_nothing(client: Any) -> None:
    with client.timer("nothing"):
        pass


def _timed(calls: list[Callable[[int], Any]], rounds: int, pause_s: float) -> list[list[int]]:
    """Nanoseconds of each call in each of `rounds` rounds that make all of them, less what an
    empty call takes."""
    clock = time.perf_counter_ns
    own_times = []
    for step in range(10_000):
        began = clock()
        _nothing(step)
        own_times.append(clock() - began)
    own = sorted(own_times)[len(own_times) // 2]
    times: list[list[int]] = [[] for _ in calls]
    for step in range(-rounds // 20, rounds):
        for call, taken in zip(calls, times, strict=True):
            if pause_s:
                time.sleep(pause_s)
            began = clock()
            call(step)
            ended = clock()
            if step >= 0:
                taken.append(ended - began - own)
    return times


def _spread(times: list[int]) -> dict[str, float]:
    ordered = sorted(times)
    last = len(ordered) - 1
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: ordered[round(share * last)] / 1e3 for name, share in at.items()}


if __name__ == "__main__":
    print(json.dumps(_worker(sys.argv[1] == "1", sys.argv[2] == "1")))
