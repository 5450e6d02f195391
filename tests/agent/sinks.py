"""Sinks as the tests of the pipeline make them."""

from __future__ import annotations

import threading

from tests.fakes import DEADLINE_S
from trackagent.agent.store.contract import Batch, BatchId, Rejected


class FakeSink:
    """Accepts, after it has raised what stands in `problems`; waits in `deliver` while `gate` is closed."""

    def __init__(self, name: str = "fake", *problems: Exception) -> None:
        self.name = name
        self.problems = list(problems)
        self.tried: list[Batch] = []
        self.accepted: list[Batch] = []
        self.gate = threading.Event()
        self.gate.set()
        self.idle_calls = 0
        self.idle_work = 0
        self.idle_problem: Exception | None = None
        self.closed = False

    def deliver(self, batch: Batch) -> None:
        self.tried.append(batch)
        assert self.gate.wait(DEADLINE_S)
        if self.problems:
            raise self.problems.pop(0)
        self.accepted.append(batch)

    def idle(self, deadline_s: float) -> bool:
        self.idle_calls += 1
        if self.idle_problem is not None:
            raise self.idle_problem
        self.idle_work -= 1
        return self.idle_work > 0

    def close(self) -> None:
        self.closed = True

    @property
    def steps(self) -> list[int]:
        """Of all that was accepted, in order."""
        return [
            int(step) for batch in self.accepted for part in batch.points for step in part.steps
        ]


class GatheringSink(FakeSink):
    """Wants an hour between deliveries."""

    gather_s = 3600.0


class PickySink(FakeSink):
    """Rejects every batch with a step of `bad`; takes a batch id once, as every sink does."""

    def __init__(self, *bad: int) -> None:
        super().__init__("fake")
        self.bad = set(bad)
        self.ids: set[BatchId] = set()

    def deliver(self, batch: Batch) -> None:
        steps = {int(step) for part in batch.points for step in part.steps}
        if steps & self.bad:
            self.tried.append(batch)
            raise Rejected(f"bad steps {sorted(steps & self.bad)}")
        if batch.id not in self.ids:
            super().deliver(batch)
            self.ids.add(batch.id)

    @property
    def messages(self) -> list[str]:
        """Of all events that were accepted."""
        return [event.message for batch in self.accepted for event in batch.events]
