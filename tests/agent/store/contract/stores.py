"""The stores that the contract is run over, and their answers in a form that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.agent.store.batches import (
    RUN,
    batch,
    end,
    event,
    loss,
    param,
    points,
    producer,
)
from trackagent.agent.store.contract import (
    Batch,
    Reader,
    RunSummary,
    Writer,
)

R0, R1 = producer(0), producer(1)
AGAIN = producer(0, attempt=2)
FORKED = producer(0, forked=True)

OpenStore = Callable[[], tuple[Writer, Reader]]


STORY = [
    batch(
        1,
        R0,
        R1,
        params=[param(R0, "lr", "1")],
        points=[points(R0, range(10)), points(R1, range(0, 20, 2), keys=("loss", "lr"))],
        metric_records={R0.producer_id: 10, R1.producer_id: 10},
    ),
    batch(
        2,
        R0,
        points=[points(R0, range(10, 40)), points(R0, range(40, 50), keys=("loss", "acc"))],
        events=[event(R0, "spike", step=12)],
        metric_records={R0.producer_id: 40},
        losses=[loss(R0, "full", 4)],
    ),
    batch(3, AGAIN, points=[points(AGAIN, range(30, 60))], tags=[param(AGAIN, "t", "new", 9)]),
    batch(
        4,
        R0,
        R1,
        ends=[end(R0, "killed", logged=-1), end(R1, logged=10)],
        losses=[loss(R0, "full", 2)],
    ),
    batch(
        5, R0, ends=[end(R0, "failed", error="boom", logged=50)], tags=[param(R0, "t", "old", 8)]
    ),
    batch(1, AGAIN, origin="another", ends=[end(AGAIN, logged=30)]),
]


class Merging:
    """A writer that merges after every batch."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self.compact, self.close = writer.compact, writer.close

    def write(self, batch: Batch) -> None:
        self._writer.write(batch)
        assert self._writer.compact(60) is False


def everything(reader: Reader) -> dict[str, Any]:
    """All answers of a store that do not name an order of arrival, comparable."""
    answers: dict[str, Any] = {"runs": reader.runs()}
    for run in reader.runs():
        infos = reader.series_list(run.run_id)
        answers[run.run_id] = (
            reader.params(run.run_id),
            reader.tags(run.run_id),
            reader.losses(run.run_id),
            reader.gaps(run.run_id),
            sorted((one.time_ns, one.message) for one in reader.events(run.run_id)),
            [(*astuple(info), bits(info.last_value)) for info in infos],
            [arrays(reader.series(run.run_id, info.key, info.source)) for info in infos],
            [arrays(reader.buckets(run.run_id, info.key, info.source, 7)) for info in infos],
            sorted(arrays(block) for block in exported(reader, run.run_id)),
        )
    return answers


def exported(reader: Reader, run_id: str) -> list[Any]:
    """Every stored point on its own: how points are cut into blocks is nobody's business."""
    found = []
    for block in reader.export(run_id):
        for at, step in enumerate(block.steps):
            values = tuple(bits(value) for value in block.values[:, at])
            rest = (block.attempt, int(step), int(block.times_ns[at]), values)
            found.append((block.source, block.rank, block.keys, *rest))
    return found


def astuple(info: Any) -> tuple[Any, ...]:
    return (info.key, info.source, info.points, info.first_step, info.last_step)


def arrays(shown: Any) -> Any:
    if isinstance(shown, tuple):
        return shown
    return tuple(
        part.tobytes() if isinstance(part, np.ndarray) else part
        for part in (getattr(shown, name) for name in shown.__slots__)
    )


def bits(value: float) -> str:
    return np.float64(value).tobytes().hex()


def summary(reader: Reader, run_id: str = RUN) -> RunSummary:
    return reader.run(run_id)
