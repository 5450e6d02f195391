"""Weights, definitions and groups: what of them is in the journal, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.client.runs import logged, losses, warnings
from tests.fakes import Folders, read_segments, said
from trackagent import client
from trackagent.client import ConfigError, Run
from trackagent.client.record import Kind

WEIGHT = "trackagent/weight"


def definitions(folders: Folders) -> dict[str, Any]:
    """What was defined, by pattern."""
    prefix = "trackagent/define/"
    return {
        name.removeprefix(prefix): json.loads(text)
        for tags in said(folders, Kind.TAGS)
        for name, text in tags.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("weight", [512, 0, 0.5, np.int64(7), np.float32(2.5)], ids=repr)
def test_a_weight_goes_with_its_record(run: Run, folders: Folders, weight: Any) -> None:
    for _ in range(2):  # first with unknown, then with known keys
        run.log({"loss": 1.0}, step=3, weight=weight)
    assert logged(folders) == [(3, {"loss": 1.0, WEIGHT: float(weight)})] * 2


@pytest.mark.parametrize(
    "weight",
    [-1, -0.5, math.nan, math.inf, "many", [1, 2], 10**400],
    ids=lambda weight: str(weight)[:8],
)
def test_a_weight_that_is_none_is_refused_and_the_values_kept(
    run: Run, folders: Folders, weight: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        run.log({"loss": 1.0}, step=3, weight=weight)
    assert logged(folders) == [(3, {"loss": 1.0})] * 2
    run.finish()
    assert sum(losses(folders).values()) == 2
    (warning,) = warnings(caplog)
    assert "weight" in warning


def test_a_strict_run_raises_a_bad_weight_and_keeps_the_values(
    start: Callable[..., Run], folders: Folders
) -> None:
    run = start(strict=True)
    with pytest.raises(client.ValueRefused, match="is no number of 0 or more"):
        run.log({"loss": 1.0}, weight=-1)
    assert logged(folders) == [(0, {"loss": 1.0})]


def test_without_values_there_is_no_record(run: Run, folders: Folders) -> None:
    run.log({}, weight=3)
    run.log(None, weight=3)  # type: ignore[arg-type]
    assert logged(folders) == []


def test_a_definition_is_a_tag(run: Run, folders: Folders) -> None:
    run.define("train/*", reduce="sum", keep="extremes", every=10)
    client.define("eval/*")
    assert definitions(folders) == {
        "train/*": {"reduce": "sum", "keep": "extremes", "every": 10},
        "eval/*": {"reduce": "mean", "keep": None, "every": 1},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"pattern": ""},
        {"pattern": "a" * 250},
        {"pattern": 7},
        {"pattern": "["},
        {"pattern": "train/[abc"},
        {"pattern": "[]"},
        {"pattern": "[!]"},
        {"pattern": "[ab]/[cd"},
        {"pattern": "[z-a]"},
        {"pattern": "[!a-c9-0]"},
        {"reduce": "median"},
        {"keep": "some"},
        {"reduce": "none", "keep": "extremes"},
        {"every": 0},
        {"every": 1.5},
        {"every": None},
        {"reduce": np.array([1, 2])},
    ],
    ids=repr,
)
def test_a_wrong_definition_is_refused(
    run: Run, folders: Folders, wrong: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    run.define(**{"pattern": "train/*", **wrong})
    run.finish()
    assert definitions(folders) == {}
    assert warnings(caplog)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        (
            "train/[abc",
            "the pattern 'train/[abc' has a [ that no ] closes: close it, or write [[] ",
        ),
        ("rank[9-0]", "the pattern 'rank[9-0]' has the range 9-0, in which nothing is: write 0-9"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_told_with_what_to_write(
    run: Run, pattern: str, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    run.define(pattern)
    run.finish()
    assert problem in warnings(caplog)[0]


@pytest.mark.parametrize(
    "pattern",
    ["layer[[]0]/*", "[]]", "[!]]x", "[!!]", "[a-c-e]", "[-a]", "[a-]", "]", "a-z", "[--0]"],
)
def test_sets_as_fnmatch_reads_them_are_patterns(run: Run, folders: Folders, pattern: str) -> None:
    run.define(pattern)
    assert list(definitions(folders)) == [pattern]


def test_groups_are_part_of_who_logs(start: Callable[..., Run], folders: Folders) -> None:
    start(groups={"tp": 0, "dp": "left"})
    (journal,) = folders.journals()
    (segment, *_) = read_segments(journal)
    assert segment.header.identity["groups"] == {"tp": "0", "dp": "left"}


@pytest.mark.parametrize(
    "groups",
    [
        {"": 1},
        {"tp": ""},
        {"tp": 1.5},
        {"a=b": 1},
        {"a b": 1},
        {"tp": "x" * 65},
        {f"g{n}": 1 for n in range(9)},
        ["tp"],
    ],
    ids=repr,
)
def test_wrong_groups_are_refused_at_once(start: Callable[..., Run], groups: Any) -> None:
    with pytest.raises(ConfigError, match="group"):
        start(groups=groups)
