"""The embedded store against its budgets: bytes a point, write throughput, drawing a series, listing runs,
finding a run's part of what its node sampled.

    python benchmarks/store.py [folder]

Writes the curves of a training (losses in float32, a learning-rate schedule, float64 timers, accuracies) of
four ranks with ten keys, in batches of 200 records a rank, as the pipeline does. The folder (default: a
temporary one) should lie on the disk that is to be measured.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from trackagent.agent.store import open_reader, open_writer
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    Floats,
    Points,
    ProducerEnd,
    ProducerInfo,
    node_run_id,
)

RANKS = 4
RECORDS = 262_144
BATCH_RECORDS = 200
LONG_POINTS = 1_000_000
RUNS = 100_000
SAMPLED_DAYS = 28
SAMPLED_RUN_S = 3600
BUCKETS = 2_000
KEYS = (
    *("train/loss", "train/aux_loss", "train/grad_norm", "train/lr", "train/accuracy"),
    *("time/forward", "time/backward", "time/optimizer", "epoch", "tokens"),
)


def curves(n: int, seed: int) -> Floats:
    """(10, n) values as a training logs them."""
    random = np.random.default_rng(seed)
    step = np.arange(n)

    def single(values: Floats) -> Floats:
        return values.astype(np.float32).astype(np.float64)

    def timer(mean_s: float) -> Floats:
        return np.rint(random.lognormal(np.log(mean_s), 0.15, n) * 1e9) / 1e9

    decay = np.exp(-step / (n / 4))
    warm_up = np.minimum(1, step / 2000)
    return np.stack(
        [
            single(2 + 8 * decay + random.normal(0, 0.1, n)),
            single(0.01 + 0.02 * decay * random.lognormal(0, 0.3, n)),
            single(random.lognormal(0, 0.5, n)),
            3e-4 * warm_up * 0.5 * (1 + np.cos(np.pi * step / n)),
            single(random.binomial(256, 0.9 - 0.8 * decay) / 256),
            timer(0.031),
            timer(0.062),
            timer(0.004),
            (step // 5000).astype(np.float64),
            step * 4_194_304.0,
        ]
    )


def times(n: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """(n,) nanoseconds, ten a second with jitter."""
    between = np.random.default_rng(seed).normal(1e8, 2e6, n)
    return 1_700_000_000_000_000_000 + np.cumsum(between).astype(np.int64)


def producer(number: int, run_id: str, rank: int) -> ProducerInfo:
    return ProducerInfo(
        number.to_bytes(16, "big"),
        run_id,
        1,
        rank,
        rank,
        RANKS,
        "node",
        1,
        number,
        "bench",
        "",
        False,
    )


def write_training(path: Path) -> dict[str, float]:
    """Figures of writing RANKS x RECORDS records of ten keys."""
    infos = [producer(rank + 1, "a" * 32, rank) for rank in range(RANKS)]
    values = [curves(RECORDS, rank) for rank in range(RANKS)]
    clocks = [times(RECORDS, rank) for rank in range(RANKS)]
    steps = np.arange(RECORDS, dtype=np.int64)
    writer = open_writer(path)
    written = compacted = 0.0
    for number, at in enumerate(range(0, RECORDS, BATCH_RECORDS)):
        part = slice(at, at + BATCH_RECORDS)
        points = [
            Points(info.producer_id, KEYS, steps[part], clock[part], value[:, part])
            for info, clock, value in zip(infos, clocks, values, strict=True)
        ]
        batch = Batch(
            BatchId("bench", number, number),
            infos if number == 0 else (),
            points=points,
            metric_records={info.producer_id: len(steps[part]) for info in infos},
        )
        written += seconds(lambda batch=batch: writer.write(batch))  # type: ignore[misc]
        if number % 8 == 7:
            compacted += seconds(lambda: writer.compact(60))
    number += 1
    ends = [ProducerEnd(info.producer_id, 9, "finished", "", RECORDS) for info in infos]
    writer.write(Batch(BatchId("bench", number, number), ends=ends))
    compacted += seconds(lambda: writer.compact(60))
    small = []
    for _ in range(200):
        number += 1
        point = Points(b"\0" * 16, KEYS, steps[:1], clocks[0][:1], values[0][:, :1])
        batch = Batch(BatchId("bench", number, number), [producer(0, "b" * 32, 0)], points=[point])
        small.append(seconds(lambda batch=batch: writer.write(batch)))  # type: ignore[misc]
    writer.close()
    total = RANKS * RECORDS * len(KEYS)
    return {
        "bytes a point": path.stat().st_size / total,
        "points/s written": total / written,
        "points/s written and merged": total / (written + compacted),
        "ms a write of one record": float(np.median(small)) * 1e3,
    }


def draw_long(path: Path) -> dict[str, float]:
    """Figures of drawing a series of LONG_POINTS points of float32 values."""
    writer = open_writer(path)
    info = producer(1, "a" * 32, 0)
    values = curves(LONG_POINTS, 1)
    steps = np.arange(LONG_POINTS, dtype=np.int64)
    points = Points(info.producer_id, KEYS, steps, times(LONG_POINTS, 1), values)
    writer.write(Batch(BatchId("bench", 0, 0), [info], points=[points]))
    writer.close()
    reader = open_reader(path)
    figures = {
        f"ms to draw {key}": best(lambda key=key: reader.buckets("a" * 32, key, "rank 0", BUCKETS))  # type: ignore[misc]
        for key in ("train/loss", "time/forward", "train/lr")
    }
    reader.close()
    return figures


def list_runs(path: Path) -> dict[str, float]:
    """Figures of listing a page of RUNS runs."""
    writer = open_writer(path)
    for first in range(0, RUNS, 5000):
        infos = [
            producer(i + 1, f"{i * 2654435761 % 2**32:032x}", 0) for i in range(first, first + 5000)
        ]
        ends = [
            ProducerEnd(info.producer_id, 10**9, ("finished", "failed")[i % 2], "", 0)
            for i, info in enumerate(infos)
        ]
        writer.write(Batch(BatchId("bench", first, first + 4999), infos, ends=ends))
    writer.close()
    reader = open_reader(path)
    assert len(reader.runs(experiment="bench", status="failed")) == 100
    page = best(lambda: reader.runs(experiment="bench", status="failed"))
    reader.close()
    return {f"ms for a page of {RUNS} runs": page}


def find_samples(path: Path) -> dict[str, float]:
    """Figures of a run of an hour on a node that was sampled for four weeks, ten keys once a second."""
    day_s = 86_400
    node = replace(producer(1, node_run_id("node"), 0), sampled="node node")
    began_s = SAMPLED_DAYS // 2 * day_s + 12_345
    rank = replace(producer(2, "a" * 32, 0), start_time_ns=began_s * 10**9)
    ends = [ProducerEnd(rank.producer_id, (began_s + SAMPLED_RUN_S) * 10**9, "finished", "", 0)]
    writer = open_writer(path)
    writer.write(Batch(BatchId("bench", 0, 0), [node, rank], ends=ends))
    values = np.round(np.random.default_rng(1).random((len(KEYS), day_s)) * 100, 1)
    for day in range(SAMPLED_DAYS):
        steps = np.arange(day * day_s, (day + 1) * day_s, dtype=np.int64)
        points = Points(node.producer_id, KEYS, steps, steps * 10**9, values)
        writer.write(Batch(BatchId("bench", day + 1, day + 1), points=[points]))
        writer.compact(60)
    writer.close()
    reader = open_reader(path)
    assert len(reader.series("a" * 32, "epoch", "node node").steps) == SAMPLED_RUN_S + 1
    figures = {
        "ms to list an hour of samples": best(lambda: reader.samples_list("a" * 32)),
        "ms to draw one of them": best(
            lambda: reader.buckets("a" * 32, "epoch", "node node", BUCKETS)
        ),
    }
    reader.close()
    return figures


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def best(call: Callable[[], object]) -> float:
    return min(seconds(call) for _ in range(7)) * 1e3


def main() -> None:
    given = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="store-bench-", dir=given))
    try:
        for measure in (write_training, draw_long, list_runs, find_samples):
            for name, figure in measure(folder / measure.__name__ / "store.db").items():
                print(f"{name:34} {figure:14,.2f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
