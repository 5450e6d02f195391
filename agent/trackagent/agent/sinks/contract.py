"""What a sink does with a delivery."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from trackagent.agent.errors import AgentError
from trackagent.agent.store.contract import Batch


class Away(AgentError):
    """The sink's other end does not answer. When it does, it may be another one, and know less."""


class Sink(Protocol):
    """Takes batches, one at a time, on one thread of its own.

    `deliver` returns when the batch is accepted for good; a batch whose id was accepted before, or whose
    range lies in one that was, changes nothing. store.contract.Rejected: it can never be accepted. Any other
    exception: kept, to be tried again. `idle` is called between deliveries, unless there is a backlog of
    them; it may work for about `deadline_s` seconds, and returns whether more is left to do. After `close`
    nothing is called.
    """

    name: str

    def deliver(self, batch: Batch) -> None: ...

    def idle(self, deadline_s: float) -> bool: ...

    def close(self) -> None: ...


@runtime_checkable
class Remembers(Protocol):
    """A sink that can say what it has: nothing is delivered twice even when the spool's cursor is lost."""

    def last_accepted(self, origin: str) -> int:
        """The last batch of the spool `origin` that was accepted, 0 for none. Called before the first
        delivery, and after the spool was damaged."""
        ...


@runtime_checkable
class Gathers(Protocol):
    """A sink whose other end has many to listen to, and says how often it wants to hear from each."""

    gather_s: float
    """How long after the beginning of a delivery the next one should begin, at least: less costs others."""


def says_something(batch: Batch) -> bool:
    """Whether it says more than the parts of other agents that it carries."""
    return bool(
        batch.producers
        or batch.params
        or batch.tags
        or batch.events
        or batch.points
        or batch.ends
        or batch.losses
        or batch.gaps
    )
