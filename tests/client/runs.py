"""What a run in the test's own process has recorded, lost and warned of."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.fakes import Folders, logged_records, said
from trackagent.client.record import Kind


def logged(folders: Folders) -> list[tuple[int, dict[str, float]]]:
    return [(one.step, dict(one.values)) for one in logged_records(folders)]


def losses(folders: Folders) -> Mapping[str, int]:
    """What the finished run says was lost."""
    return said(folders, Kind.LOSS)[-1] if said(folders, Kind.LOSS) else {}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was warned of, but for the end without an agent."""
    return [
        one.getMessage()
        for one in caplog.records
        if one.name == "trackagent" and not one.getMessage().startswith("not everything was")
    ]
