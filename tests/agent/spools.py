"""What tests of the spool share."""

from __future__ import annotations

from collections.abc import Callable

from tests.agent.samples import losses, producer
from trackagent.agent.spool import Delivery, Spool

OpenSpool = Callable[..., Spool]
ANY_SIZE = 1 << 30
DATA = losses(range(4))
ID = producer().producer_id


def delivery(spool: Spool, sink: str = "store", max_bytes: int = ANY_SIZE) -> Delivery:
    found = spool.next_delivery(sink, max_bytes).result()
    assert found is not None
    return found


def ranges(found: Delivery) -> list[tuple[int, int, bytes]]:
    """(lane, offset, bytes) of each batch."""
    return [(one.lane, one.first_offset, one.journal_bytes) for one in found.batches]


def spooled(spool: Spool, sink: str = "store") -> list[tuple[int, int, bytes]]:
    """Everything that waits for a sink."""
    found = spool.next_delivery(sink, ANY_SIZE).result()
    return [] if found is None else ranges(found)


def appended(spool: Spool, count: int) -> None:
    """`count` batches of one lane, after those of before."""
    begin = spool.committed(ID).result().get(0, 0)
    for number in range(count):
        spool.append(ID, 0, begin + number * len(DATA), DATA).result()
