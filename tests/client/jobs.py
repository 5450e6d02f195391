"""Ranks of a job that agree through a store in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tests.fakes import DEADLINE_S
from trackagent.client.history import History
from trackagent.client.hub import Hub
from trackagent.client.identity import Decision, decide
from trackagent.client.ranks import Ranks

A = "a" * 32
B = "b" * 32
HUB = Hub("node-0:7717", "0" * 64, "1" * 32)
OTHER_HUB = Hub("node-1:7717", "2" * 64, "3" * 32)


class MemoryStore:
    """A store that lives as long as its owner wants, as torchrun's does."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.data: dict[str, bytes] = {}
        self.broken = False

    def _alive(self) -> None:
        if self.broken:
            raise RuntimeError("connection was closed")

    def add(self, key: str, amount: int, /) -> int:
        with self.lock:
            self._alive()
            self.data[key] = str(int(self.data.get(key, b"0")) + amount).encode()
            return int(self.data[key])

    def set(self, key: str, value: str, /) -> None:
        with self.lock:
            self._alive()
            self.data[key] = value.encode()

    def get(self, key: str, /) -> bytes:
        with self.lock:
            self._alive()
            return self.data[key]

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        with self.lock:
            self._alive()
            if self.data.get(key, b"") == expected.encode():
                self.data[key] = desired.encode()
            return self.data[key]


@dataclass
class MemoryLink:
    store: MemoryStore | None
    standing: bool = True
    name: str = "the store"
    gone: bool = False

    def open(self) -> MemoryStore | None:
        return self.store

    def alive(self) -> bool:
        return not self.gone

    def close(self) -> None:
        pass


@dataclass
class Job:
    """Processes of one job. Every rank() is a new process unless it is given a history."""

    link: MemoryLink | None
    world_size: int = 2
    decisions: list[Decision] = field(default_factory=list)

    def find(self, environ: Mapping[str, str]) -> Any:
        return self.link, None, "there is no store"

    def rank(self, rank: int, *, timeout_s: float = DEADLINE_S, **changes: Any) -> Decision:
        environ = {"RANK": str(rank), "WORLD_SIZE": str(self.world_size)}
        arguments: dict[str, Any] = {
            "run_id": None,
            "timeout_s": timeout_s,
            "history": History(),
            "find": self.find,
            "environ": environ | changes.pop("environ", {}),
        }
        decision = decide(**(arguments | changes))
        self.decisions.append(decision)
        return decision

    def all_ranks(self, **changes: Any) -> list[Decision]:
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(lambda rank: self.rank(rank, **changes), range(self.world_size)))

    def kill(self) -> None:
        """Ends what all ranks so far still do, as SIGKILL would."""
        for decision in self.decisions:
            decision.stop_serving(wait_s=0)


@dataclass
class Names:
    """A node that knows which hub to name, or what to say where there is none."""

    hub: Hub | None = None
    problem: str = ""
    cannot_hear: str = ""

    def name(self, ranks: Ranks) -> tuple[Hub | None, str]:
        assert ranks.rank == 0
        return self.hub, self.problem

    def unheard(self, ranks: Ranks) -> str:
        return self.cannot_hear

    def of(self, run_id: str) -> Hub | None:
        return self.hub


def runs(decisions: list[Decision]) -> set[tuple[str, int]]:
    return {(d.identity.run_id, d.identity.attempt) for d in decisions}


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
