"""The sink that keeps everything in a store of this node."""

from __future__ import annotations

from trackagent.agent.store.contract import Batch, Writer


class StoreSink:
    """Delivers to a store's Writer, which already gives what a sink promises."""

    name = "store"

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def deliver(self, batch: Batch) -> None:
        self._writer.write(batch)

    def last_accepted(self, origin: str) -> int:
        return self._writer.last_written(origin)

    def idle(self, deadline_s: float) -> bool:
        return self._writer.compact(deadline_s)

    def close(self) -> None:
        self._writer.close()
