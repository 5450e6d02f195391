"""What it costs a training loop on a GPU to log 10 tensors a step, beside not logging and beside `.item()`.

The three take turns in one process, a block of steps each that ends with a synchronisation. `log()` alone is
timed after a step and a synchronisation, so that it meets cold caches and no queue. A trace by torch.profiler
says which of CUDA's functions were called in `log()`; the same trace of `.item()` shows that it would see a
synchronisation. At the end the store is read, and compared with what `.item()` gave for the same tensors."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import (
    BenchmarkError,
    Figure,
    Node,
    NotOnThisMachine,
    node,
    outcome,
    start_worker,
)
from trackagent.agent.store import open_reader

METRICS, WIDTH, BATCH = 10, 1024, 512
BLOCKS, QUICK_BLOCKS, BLOCK_STEPS = 60, 10, 20
CALLS, QUICK_CALLS, TRACED_CALLS = 1000, 200, 20
BUDGET_US = 15.0
EXIT_NO_GPU = 3
# Calls that wait for the device, or ask it something; cudaMemcpy without Async is one as well.
WAITING = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaEventQuery",
    "cudaStreamQuery",
    "cudaMemcpy",
    "cudaMalloc",
    "cudaHostAlloc",
    "cudaFree",
)


def measure(quick: bool) -> Iterator[Figure]:
    """Milliseconds a step, microseconds a tensor, and what must not be."""
    if find_spec("torch") is None:
        raise NotOnThisMachine("no torch here")
    with node(agent=True) as here:
        worker = start_worker("cuda", here, [int(quick)])
        try:
            found = outcome(worker)
        except BenchmarkError:
            if worker.returncode == EXIT_NO_GPU:
                raise NotOnThisMachine("no GPU here") from None
            raise
        wrong = _wrong(here, found["run"], found["items"])
    without, logged, with_item = (found["step_ms"][how] for how in ("without", "log", "item"))
    yield Figure(name="a step without logging", value=without, unit="ms", note=found["gpu"])
    yield Figure(
        name=f"a step with log() of {METRICS} tensors",
        value=logged,
        unit="ms",
        note=f"{100 * (logged / without - 1):+.1f} %",
    )
    yield Figure(
        name=f"a step with log() of {METRICS} .item()",
        value=with_item,
        unit="ms",
        note=f"{100 * (with_item / without - 1):+.1f} %",
    )
    calls = sorted(found["call_us"])
    yield Figure(
        name=f"log() of {METRICS} tensors: median, a tensor",
        value=median(calls) / METRICS,
        unit="µs",
        budget=BUDGET_US,
        note=f"a call: median {median(calls):.0f}, p99 {calls[len(calls) * 99 // 100]:.0f}, max "
        f"{calls[-1]:.0f}; the process's first, which prepares the ring: {found['first_ms']:.1f} ms",
    )
    yield Figure(
        name=f"calls that wait, in {TRACED_CALLS} log()",
        value=sum(found["in_log"].get(name, 0) for name in WAITING),
        unit="",
        budget=0.0,
        note=f"all of CUDA's calls in log(): {_counted(found['in_log'])}; in the same .item(): "
        f"{_counted(found['in_item'])}",
    )
    yield Figure(
        name="values that are not .item()'s, or not there",
        value=wrong,
        unit="",
        budget=0.0,
        note=f"of {METRICS * len(found['items']['metric_0'])}",
    )


def _counted(calls: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(calls.items())) or "none"


def _wrong(here: Node, run_id: str, items: Mapping[str, Sequence[float]]) -> int:
    """How many of the values that were logged as tensors are not in the store as `.item()` gave them."""
    reader = open_reader(here.store_path)
    try:
        wrong = 0
        for key, expected in items.items():
            series = reader.series(run_id, key, "rank 0")
            stored = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
            wrong += sum(stored.get(step) != value for step, value in enumerate(expected))
        return wrong
    finally:
        reader.close()


class Training:
    """A network of a few layers, and what people log of it."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch = torch
        layers = [torch.nn.Linear(WIDTH, WIDTH, device=device) for _ in range(METRICS - 2)]
        self._network = torch.nn.Sequential(*layers)
        self._weights = [layer.weight for layer in layers]
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=1e-3)
        self._data = torch.randn(BATCH, WIDTH, device=device)

    def step(self) -> dict[str, Any]:
        """One step of training; its metrics, METRICS tensors of one element on the device."""
        torch = self._torch
        self._optimizer.zero_grad()
        loss = (self._network(self._data) - self._data).square().mean()
        loss.backward()
        norms = [weight.grad.norm() for weight in self._weights]
        self._optimizer.step()
        found = [loss, torch.stack(norms).norm(), *norms]
        return {f"metric_{number}": one for number, one in enumerate(found)}


def _worker(quick: bool) -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        sys.exit(EXIT_NO_GPU)
    from trackagent import client

    run = client.init("bench")
    training = Training(torch, "cuda")
    metrics = training.step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    run.log({"first": metrics["metric_0"]})
    first_ms = (time.perf_counter() - began) * 1e3
    items: dict[str, list[float]] = {key: [] for key in metrics}
    for step in range(BLOCK_STEPS):
        metrics = training.step()
        run.log(metrics, step)
        for key, tensor in metrics.items():
            items[key].append(tensor.item())
    step_ms = _steps(torch, training, run, QUICK_BLOCKS if quick else BLOCKS)
    call_us = []
    for _ in range(QUICK_CALLS if quick else CALLS):
        metrics = training.step()
        torch.cuda.synchronize()
        began_ns = time.perf_counter_ns()
        run.log(metrics)
        call_us.append((time.perf_counter_ns() - began_ns) / 1e3)
    in_log = _traced(torch, lambda: run.log(metrics))
    in_item = _traced(torch, lambda: [tensor.item() for tensor in metrics.values()])
    if not any("Synchronize" in name for name in in_item):
        raise SystemExit(f"the trace shows no synchronisation in .item(): {in_item}")
    if not run.finish():
        raise SystemExit("not everything was delivered in time")
    return {
        "gpu": f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        "run": run.id,
        "first_ms": first_ms,
        "items": items,
        "step_ms": step_ms,
        "call_us": call_us,
        "in_log": in_log,
        "in_item": in_item,
    }


def _steps(torch: Any, training: Training, run: Any, blocks: int) -> dict[str, float]:
    """Milliseconds of a step, each the median of its blocks."""
    logging: dict[str, Callable[[dict[str, Any]], None]] = {
        "without": lambda metrics: None,
        "log": run.log,
        "item": lambda metrics: run.log({key: one.item() for key, one in metrics.items()}),
    }
    taken: dict[str, list[float]] = {how: [] for how in logging}
    for _ in range(blocks):
        for how, log in logging.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(BLOCK_STEPS):
                log(training.step())
            torch.cuda.synchronize()
            taken[how].append((time.perf_counter() - began) / BLOCK_STEPS * 1e3)
    return {how: median(times) for how, times in taken.items()}


def _traced(torch: Any, call: Callable[[], object]) -> dict[str, int]:
    """How often each of CUDA's functions was called, in TRACED_CALLS calls, from whichever thread."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(TRACED_CALLS):
            with torch.profiler.record_function("the call"):
                call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    ranges = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == "the call"
    ]
    if len(ranges) != TRACED_CALLS:
        raise SystemExit(f"the trace shows {len(ranges)} calls, of {TRACED_CALLS}")
    counted: dict[str, int] = {}
    for event in events:
        is_cudas = event.get("cat") in ("cuda_runtime", "cuda_driver")
        if is_cudas and any(start <= event["ts"] <= end for start, end in ranges):
            counted[event["name"]] = counted.get(event["name"], 0) + 1
    return counted


if __name__ == "__main__":
    print(json.dumps(_worker(sys.argv[1] == "1")))
