"""docs/metrics.md lists what the collectors sample, each key with its unit and source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trackagent.agent.collect.metrics import metrics_of, rows
from trackagent.agent.collect.table import COLLECTORS

PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.mark.parametrize("collector", COLLECTORS)
def test_the_page_lists_what_a_collector_samples(collector: str) -> None:
    _, _, section = PAGE.read_text().partition(f"\n## {collector}\n")
    section, _, _ = section.partition("\n## ")
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert shown == rows(metrics_of(collector))


def test_the_page_has_no_collector_that_is_not_there() -> None:
    known = {*COLLECTORS, "torch"}  # which the client samples
    assert set(re.findall(r"^## (\w+)$", PAGE.read_text(), re.MULTILINE)) <= known


@pytest.mark.parametrize("collector", COLLECTORS)
def test_every_key_is_there_once_and_says_whose_it_is(collector: str) -> None:
    keys = [metric.key for metric in metrics_of(collector)]
    others = {m.key for one in COLLECTORS if one != collector for m in metrics_of(one)}
    assert sorted(set(keys) - others) == sorted(keys)
    assert all(re.fullmatch(r"[a-z0-9_]+(/([a-z0-9_]+|\{[a-z]+\}))+", key) for key in keys)
