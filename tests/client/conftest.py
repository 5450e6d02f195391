"""Fixtures of runs in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fakes import Folders
from trackagent import client
from trackagent.client import Run, facts


@pytest.fixture
def start(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """start(**options): begins a run in this process, without an agent, and forgets it after the test."""
    monkeypatch.setenv("TRACKAGENT_DIR", str(folders.directory))
    monkeypatch.setenv("TRACKAGENT_STATE", str(folders.state))
    monkeypatch.setenv("TRACKAGENT_SEGMENT_BYTES", "65536")
    # Tags about git come at any moment, beside what a test counts.
    monkeypatch.setattr(facts, "slow", dict)
    client._warn_no_run.cache_clear()

    def begin(experiment: str = "test", **options: Any) -> Run:
        return client.init(experiment, **options)

    yield begin
    client.finish()


@pytest.fixture
def run(start: Callable[..., Run]) -> Run:
    return start()
