"""New, empty stores of each kind: what is tested here holds for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.store.contract.stores import Merging, OpenStore
from tests.fakes_store import MemoryStore
from trackagent.agent.store import open_reader, open_writer
from trackagent.agent.store.contract import (
    Reader,
    Writer,
)


@pytest.fixture(params=["sqlite", "sqlite merged at once", "memory"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OpenStore]:
    """Opens new, empty stores."""
    opened: list[Writer | Reader] = []
    numbers = itertools.count()

    def open_one() -> tuple[Writer, Reader]:
        if request.param == "memory":
            fake = MemoryStore()
            return fake, fake
        path = tmp_path / str(next(numbers)) / "store.db"
        writer, reader = open_writer(path), open_reader(path)
        opened.extend((writer, reader))
        return (Merging(writer) if "merged" in request.param else writer), reader

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def writer(store: tuple[Writer, Reader]) -> Writer:
    return store[0]


@pytest.fixture
def reader(store: tuple[Writer, Reader]) -> Reader:
    return store[1]


@pytest.fixture
def store(open_store: OpenStore) -> tuple[Writer, Reader]:
    return open_store()
