"""The processes of the ranks that log here, found by the locks of their journals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trackagent.agent.collect.contract import Here
from trackagent.agent.processes import holder
from trackagent.agent.store.contract import ProducerInfo
from trackagent.client.folder import LOCK_NAME

# A rank whose process is not found (another user's, in another PID namespace) is looked for again after this.
AGAIN_S = 60.0


class RankProcesses:
    """Which process each rank here is, for one collector."""

    def __init__(self, here: Here) -> None:
        self._here = here
        self._pids: dict[bytes, int] = {}
        self._due: dict[bytes, float] = {}

    def found(self) -> Iterator[tuple[ProducerInfo, int]]:
        """The ranks here whose processes are known, each with its number."""
        ranks = self._here.ranks()
        ids = {info.producer_id for info in ranks}
        self._pids = {id_: pid for id_, pid in self._pids.items() if id_ in ids}
        self._due = {id_: due for id_, due in self._due.items() if id_ in ids}
        now = self._here.clock()
        for info in ranks:
            id_ = info.producer_id
            if id_ not in self._pids and now >= self._due.get(id_, now):
                pid = self._find(info)
                if pid is None:
                    self._due[id_] = now + AGAIN_S
                else:
                    self._pids[id_] = pid
            if id_ in self._pids:
                yield info, self._pids[id_]

    def forget(self, info: ProducerInfo) -> None:
        """Its process has ended: the rank ends when its journal is read."""
        self._pids.pop(info.producer_id, None)
        self._due[info.producer_id] = self._here.clock() + AGAIN_S

    def _find(self, info: ProducerInfo) -> int | None:
        for folder in self._here.folders:
            lock = Path(folder) / "journals" / info.producer_id.hex() / LOCK_NAME
            if (pid := holder(info.pid, lock, self._here.proc)) is not None:
                return pid
        return None
