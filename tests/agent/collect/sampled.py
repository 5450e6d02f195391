"""What the tests of sampling share: collectors that do as they are told, and what was stored of them."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.fakes import DEADLINE_S, next_line
from trackagent.agent.collect.contract import Collector, Here, Incident, Sample
from trackagent.agent.decode import decode
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import Batch, EventData, Loss, ProducerInfo
from trackagent.client.folder import LOCK_NAME

Answer = Callable[[], Sequence[Sample | Incident]]


class Told:
    """A collector that answers what `answer` returns or raises; counts how often it was asked."""

    name = "told"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked = 0

    def sample(self) -> Sequence[Sample | Incident]:
        self.asked += 1
        return self.answer()

    def make(self, here: Here) -> Collector:
        return self


class Hanging(Told):
    """A collector that does not answer until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        super().__init__(self._hang)

    def _hang(self) -> Sequence[Sample | Incident]:
        self.let_go.wait(DEADLINE_S)
        return []


class Sink:
    """The sink `store` of a spool, in memory."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        spool.add_sink("store").result()
        self.batches: list[Batch] = []

    def take(self) -> Sink:
        """Takes what waits."""
        while delivery := self._spool.next_delivery("store", 1 << 30).result():
            self.batches.append(decode(delivery, self._spool.keys))
            self._spool.delivered("store", delivery.id.last).result()
        return self

    @property
    def events(self) -> list[EventData]:
        return [event for batch in self.batches for event in batch.events]

    @property
    def losses(self) -> list[Loss]:
        return [loss for batch in self.batches for loss in batch.losses]

    @property
    def values(self) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """Steps and values, by source and key."""
        found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        for batch in self.batches:
            for points in batch.points:
                source = next(
                    one.source for one in batch.producers if one.producer_id == points.producer_id
                )
                for key, row in zip(points.keys, points.values.tolist(), strict=True):
                    found[source, key] += zip(points.steps.tolist(), row, strict=True)
        return dict(found)


def stored(spool: Spool) -> Sink:
    """All that waits for the sink."""
    return Sink(spool).take()


def all_values(found: Sequence[Sample | Incident]) -> dict[str, float]:
    """What the samples of one moment say, whatever they are of."""
    samples = [one for one in found if isinstance(one, Sample)]
    return {key: value for one in samples for key, value in one.values.items()}


@contextlib.contextmanager
def sleeping(
    folder: Path, info: ProducerInfo, program: str = "sys.stdin.read()"
) -> Iterator[ProducerInfo]:
    """A process that holds the lock of this producer's journal under `folder`, as a rank does, until the end
    of the block; the producer with its number."""
    lock = folder / "journals" / info.producer_id.hex() / LOCK_NAME
    lock.parent.mkdir(parents=True)
    begin = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", begin + program, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert next_line(process) == "locked"
        try:
            yield dataclasses.replace(info, pid=process.pid)
        finally:
            process.kill()


def here(spool: Spool) -> list[ProducerInfo]:
    return spool.not_ended().result()
