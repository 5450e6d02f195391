"""The store on real curves: bytes a point, drawing a long series, a page of many runs.

The large figures come from benchmarks.store (a synthetic training: losses in float32, a schedule,
timers); one comes from a training on handwritten digits that goes through client and agent."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from benchmarks import store
from benchmarks.figures import Figure, node
from trackagent.agent.store import open_reader, open_writer

EPOCHS = 60
TRAINING = Path(__file__).parents[1] / "examples" / "train_digits.py"
BUDGET_BYTES, BUDGET_DRAW_MS, BUDGET_PAGE_MS = 6.0, 50.0, 100.0


def measure(quick: bool) -> Iterator[Figure]:
    """Figures of the embedded store; `quick` leaves out those that take longer than 10 s."""
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        drawn = store.draw_long(Path(folder) / "long" / "store.db")
        name, slowest = max(drawn.items(), key=lambda item: item[1])
        yield Figure(
            name=f"{store.LONG_POINTS:,} points in {store.BUCKETS:,} buckets",
            value=slowest,
            unit="ms",
            budget=BUDGET_DRAW_MS,
            note=f"the slowest of {len(drawn)} ({name.removeprefix('ms to draw ')}), best of 7",
        )
        found = store.find_samples(Path(folder) / "samples" / "store.db")
        yield Figure(
            name="an hour's samples, of four weeks",
            value=found["ms to list an hour of samples"],
            unit="ms",
            note=f"{len(store.KEYS)} series listed; one drawn: {found['ms to draw one of them']:.1f} ms; "
            "best of 7",
        )
        if quick:
            return
        listed = store.list_runs(Path(folder) / "runs" / "store.db")
        yield Figure(
            name=f"a page of {store.RUNS:,} runs",
            value=next(iter(listed.values())),
            unit="ms",
            budget=BUDGET_PAGE_MS,
            note="filtered by experiment and status, newest first; best of 7",
        )
        written = store.write_training(Path(folder) / "training" / "store.db")
        yield Figure(
            name="on disk, a long synthetic training",
            value=written["bytes a point"],
            unit="bytes/point",
            budget=BUDGET_BYTES,
            note=f"{store.RANKS} ranks x {store.RECORDS} records x {len(store.KEYS)} keys; merging "
            f"included {written['points/s written and merged']:.0f} points/s into the store alone",
        )
    yield _digits()


def _digits() -> Figure:
    with node(agent=True) as here:
        assert here.agent is not None
        training = [sys.executable, str(TRAINING), "--epochs", str(EPOCHS), "--device", "cpu"]
        subprocess.run(training, env=here.environment, stdout=subprocess.DEVNULL, check=True)
        here.agent.terminate()
        here.agent.wait(30)
        with closing(open_reader(here.store_path)) as reader:
            run = reader.run("latest")
        empty = here.state / "empty.db"
        open_writer(empty).close()
        grown = _used_bytes(here.store_path) - _used_bytes(empty)
        size = here.store_path.stat().st_size
    return Figure(
        name="on disk, a short real training (digits)",
        value=grown / run.points,
        unit="bytes/point",
        budget=BUDGET_BYTES,
        note=f"pages taken; {run.points} points in {run.series} series; the whole file has "
        f"{size / 1024:.0f} KiB, with the empty tables and pages that the next run fills",
    )


def _used_bytes(path: Path) -> int:
    """Bytes of a database file without its free pages."""
    with closing(sqlite3.connect(path)) as connection:
        pages, free, size = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
    return (pages - free) * size
