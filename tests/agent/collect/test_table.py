"""Which collectors a configuration asks for, and how often they sample."""

from __future__ import annotations

import pytest

from trackagent.agent.collect.table import COLLECTORS, intervals


def test_all_are_all_at_the_same_interval() -> None:
    assert intervals("all", 2.0) == dict.fromkeys(COLLECTORS, 2.0)


def test_none_are_none() -> None:
    assert intervals("none", 1.0) == {}


def test_some_may_have_an_interval_of_their_own() -> None:
    assert intervals(" system = 5", 1.0) == {"system": 5.0}


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ("sistem", "there is no collector 'sistem': did you mean system"),
        ("", "there is no collector '': give all, none, or system"),
        ("system,system", "system is there twice"),
        ("system=0", "the interval of system is '0': give 1 to 3600 seconds"),
        ("system=nan", "the interval of system is 'nan'"),
        ("system=soon", "the interval of system is 'soon'"),
    ],
)
def test_what_is_wrong_is_named(asked: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        intervals(asked, 1.0)
