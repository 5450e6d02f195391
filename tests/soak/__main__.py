"""`python -m tests.soak`: a node under a steady load for a long time; memory, descriptors, threads, disk and
delay must stay flat, and every record must be stored once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.fakes import AgentProcess, Folders, short_folder, wait_until
from tests.soak.producers import KEYS, RATE_HZ, Producer, missing_and_doubled
from tests.soak.samples import WINDOWS, Row, Sample, table
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import Reader

PRODUCERS = 8
SAMPLE_S = 5.0
RESTART_S = 20.0
WARM_UP_S = 20.0
DELIVERY_TIMEOUT_S = 120.0


def main() -> int:
    """The exit code: 1 when something grows, is lost, or is doubled."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak",
        description=f"{PRODUCERS} producers log {KEYS} floats {RATE_HZ} times a second each; every "
        f"{RESTART_S:g} s one of them ends, by finish() or by SIGKILL, and begins its next attempt.",
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    console = Console(stderr=True, highlight=False)
    with _folders() as folders, contextlib.closing(AgentProcess(folders)) as agent:
        agent.start()
        say = console.print if sys.stderr.isatty() else _silent
        with console.status("soaking") as status:
            samples, producers, restarts = _soak(folders, agent, options.minutes, status.update)
        say("counting what is stored")
        agent.wait_for_delivery()
        logged = [attempt for producer in producers for attempt in producer.logged]
        with contextlib.closing(open_reader(folders.state / STORE_NAME)) as reader:
            missing, doubled = missing_and_doubled(reader, logged)
        assert agent.stop() == 0, agent.output
        left = [str(path) for path in folders.journals()]
    rows = table(samples)
    records = sum(attempt.returned for attempt in logged)
    counts = {
        "minutes": options.minutes,
        "records": records,
        "points": records * KEYS,
        "restarts by finish()": restarts["finish"],
        "restarts by SIGKILL": restarts["kill"],
        "lost": missing,
        "doubled": doubled,
        "journals left": len(left),
    }
    _show(rows, counts, as_json=options.json)
    return 0 if all(row.flat for row in rows) and not (missing or doubled or left) else 1


def _soak(
    folders: Folders, agent: AgentProcess, minutes: float, progress: Callable[[str], object]
) -> tuple[list[Sample], list[Producer], dict[str, int]]:
    """The load and the samples; all producers have finished when it returns."""
    base = folders.directory.parent
    producers = [Producer(folders, base) for _ in range(PRODUCERS)]
    restarts = {"finish": 0, "kill": 0}
    samples: list[Sample] = []
    try:
        # The first one is never restarted: it is the one whose memory, descriptors and threads are watched.
        watched = producers[0]
        look = _Look(folders, agent, watched)
        began = time.monotonic()
        next_restart = began + RESTART_S
        next_sample = began + min(WARM_UP_S, 6 * minutes)
        while (now := time.monotonic()) < began + 60 * minutes or not samples:
            if now >= next_restart:
                number = sum(restarts.values())
                way = ("finish", "kill")[number // (PRODUCERS - 1) % 2]
                producers[1 + number % (PRODUCERS - 1)].restart(kill=way == "kill")
                restarts[way] += 1
                next_restart += RESTART_S
            if now >= next_sample:
                samples.append(look.sample())
                next_sample += SAMPLE_S
                progress(f"soaking: {(now - began) / 60:.1f} of {minutes:g} minutes")
            time.sleep(max(0.0, min(next_restart, next_sample) - time.monotonic()))
        look.close()
        for producer in producers:
            producer.end(kill=False)
    finally:
        for producer in producers:
            producer.process.kill()
            producer.process.communicate()
    return samples, producers, restarts


class _Look:
    """Takes samples of the node."""

    def __init__(self, folders: Folders, agent: AgentProcess, watched: Producer) -> None:
        self._folders = folders
        self._watched = watched
        assert agent.process is not None
        self._agent = psutil.Process(agent.process.pid)
        self._producer = psutil.Process(watched.process.pid)
        store = folders.state / STORE_NAME
        wait_until(store.exists, "the agent makes its store")
        self._reader: Reader = open_reader(store)
        self._seen: dict[str, int] = {}
        self._agent.cpu_percent()

    def close(self) -> None:
        self._reader.close()

    def sample(self) -> Sample:
        cpu_percent = self._agent.cpu_percent()  # since the last sample
        return Sample(
            agent_rss_mib=self._agent.memory_info().rss / 2**20,
            agent_descriptors=self._agent.num_fds(),
            agent_threads=self._agent.num_threads(),
            agent_cpu_percent=cpu_percent,
            producer_rss_mib=self._producer.memory_info().rss / 2**20,
            producer_descriptors=self._producer.num_fds(),
            producer_threads=self._producer.num_threads(),
            journals_mib=_size(self._folders.directory, "journals/*/*") / 2**20,
            spool_mib=_size(self._folders.state, "spool.db*") / 2**20,
            store_bytes_per_point=_size(self._folders.state, f"{STORE_NAME}*") / self._points(),
            delay_s=self._delay_s(),
        )

    def _points(self) -> int:
        return max(1, sum(run.points for run in self._reader.runs()))

    def _delay_s(self) -> float:
        """From log() to readable in the store: of the longest waiting record among those that come next."""
        self._new_times_ns()
        times_ns = wait_until(self._new_times_ns, "the next records are stored")
        return time.time() - min(times_ns) / 1e9

    def _new_times_ns(self) -> list[int]:
        blocks = self._reader.export(self._watched.run_id, skip=self._seen)
        return [int(block.times_ns.min()) for block in blocks if len(block.times_ns)]


def _size(folder: Path, pattern: str) -> int:
    """Bytes that the files take."""
    total = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # deleted just now
            total += path.stat().st_blocks * 512
    return total


def _silent(message: str) -> None:
    """Nobody watches."""


@contextlib.contextmanager
def _folders() -> Iterator[Folders]:
    """Journals in memory, spool and store where TMPDIR says."""
    base = short_folder()
    state = Path(tempfile.mkdtemp(prefix="trackagent-soak-"))
    try:
        yield Folders(base / "dir", state)
    finally:
        shutil.rmtree(base)
        shutil.rmtree(state)


def _show(rows: list[Row], counts: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"counts": counts, "rows": [dataclasses.asdict(row) for row in rows]}))
        return
    shown = Table(title="Soak: medians of the first, the middle and the last tenth")
    shown.add_column("what")
    for name in (*WINDOWS, "largest"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for row in rows:
        numbers = [*row.windows.values(), row.largest]
        verdict = "flat" if row.flat else "[bold red]GROWS"
        shown.add_row(row.name.replace("_", " "), *(f"{n:.2f}" for n in numbers), verdict)
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(shown)
    for name, number in counts.items():
        console.print(f"{name}: {number:,}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
