"""Fixtures of the agent's core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fakes import Folders
from trackagent.agent.spool import Spool


@pytest.fixture
def open_spool(folders: Folders) -> Iterator[Callable[..., Spool]]:
    """open_spool(**options): the spool of this test's state folder; what is open at the end is closed."""
    made: list[Spool] = []

    def opened(**options: Any) -> Spool:
        folders.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        spool = Spool(
            folders.state / "spool.db", **{"max_bytes": 1 << 30, "linger_s": 0.0, **options}
        )
        made.append(spool)
        return spool

    yield opened
    for spool in made:
        spool.close()


@pytest.fixture
def spool(open_spool: Callable[..., Spool]) -> Spool:
    """An empty spool."""
    return open_spool()
