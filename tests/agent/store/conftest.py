"""The embedded store in a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from trackagent.agent.store.reader import SqliteReader
from trackagent.agent.store.sqlite import SqliteWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "store.db"


@pytest.fixture
def writer(path: Path) -> Iterator[SqliteWriter]:
    writer = SqliteWriter(path)
    yield writer
    writer.close()


@pytest.fixture
def reader(path: Path, writer: SqliteWriter) -> Iterator[SqliteReader]:
    reader = SqliteReader(path)
    yield reader
    reader.close()
