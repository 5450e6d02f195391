"""Fixtures of runs and journals in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.client.journals import IDENTITY, SEGMENT_BYTES
from tests.fakes import Folders
from trackagent import client
from trackagent.client import Run, facts
from trackagent.client.journal import Journal


@pytest.fixture
def start(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """start(**options): begins a run in this process, without an agent, and forgets it after the test."""
    monkeypatch.setenv("TRACKAGENT_DIR", str(folders.directory))
    monkeypatch.setenv("TRACKAGENT_STATE", str(folders.state))
    monkeypatch.setenv("TRACKAGENT_SEGMENT_BYTES", "65536")
    # Tags about git come at any moment, beside what a test counts.
    monkeypatch.setattr(facts, "slow", dict)
    client._warned_no_run = False

    def begin(experiment: str = "test", **options: Any) -> Run:
        return client.init(experiment, **options)

    yield begin
    client.finish()


@pytest.fixture
def run(start: Callable[..., Run]) -> Run:
    return start()


@pytest.fixture
def open_journal(folders: Folders) -> Iterator[Callable[..., Journal]]:
    """open_journal(**settings): a journal in `folders`, closed after the test."""
    opened: list[Journal] = []

    def make(**settings: Any) -> Journal:
        arguments: dict[str, Any] = {
            "directory": folders.directory,
            "state_directory": folders.state,
            "segment_bytes": SEGMENT_BYTES,
            "memory_bytes": 100 * SEGMENT_BYTES,
            "journal_bytes": 200 * SEGMENT_BYTES,
        }
        opened.append(Journal(IDENTITY, **(arguments | settings)))
        return opened[-1]

    yield make
    for journal in opened:
        journal.seal(0.0, "the test is over")
        journal.close()


@pytest.fixture
def journal(open_journal: Callable[..., Journal]) -> Journal:
    return open_journal()
