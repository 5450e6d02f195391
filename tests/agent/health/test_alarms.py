"""What is wrong is told once, again when it gets worse, and once when it is over."""

from __future__ import annotations

from trackagent.agent.health.alarms import CALM_S, MAX_ALARMS, Alarms, Finding


def finding(level: str = "warning", subject: str = "", run_id: str = "") -> Finding:
    return Finding("memory", subject, level, "memory runs out", {"used": 0.95}, run_id)


def told(alarms: Alarms, now_s: float, *found: Finding) -> list[tuple[str, bool, float]]:
    return [
        (change.finding.level, change.over, change.lasted_s) for change in alarms.look(found, now_s)
    ]


def test_what_lasts_is_told_once_and_when_it_is_over() -> None:
    alarms = Alarms()
    assert told(alarms, 10.0, finding()) == [("warning", False, 0.0)]
    assert told(alarms, 11.0, finding()) == []
    assert told(alarms, 12.0) == []
    assert told(alarms, 11.0 + CALM_S) == [("warning", True, 1.0 + CALM_S)]
    assert told(alarms, 30.0) == []


def test_what_comes_and_goes_quickly_is_one() -> None:
    alarms = Alarms()
    assert len(told(alarms, 10.0, finding())) == 1
    for second in range(11, 60, 4):
        assert told(alarms, second) == []
        assert told(alarms, second + 2, finding()) == []


def test_what_gets_worse_is_told_again() -> None:
    alarms = Alarms()
    told(alarms, 10.0, finding())
    assert told(alarms, 12.0, finding("error")) == [("error", False, 2.0)]
    assert told(alarms, 13.0, finding("warning")) == []


def test_what_concerns_different_subjects_and_runs_is_told_of_each() -> None:
    alarms = Alarms()
    every = [finding(), finding(subject="rank 3"), finding(run_id="ab" * 16)]
    assert len(told(alarms, 10.0, *every)) == 3
    assert alarms.standing() == every


def test_the_end_of_a_run_ends_its_alarms_silently() -> None:
    alarms = Alarms()
    told(alarms, 10.0, finding(run_id="ab" * 16), finding())
    alarms.forget("ab" * 16)
    assert alarms.standing() == [finding()]


def test_alarms_are_bounded() -> None:
    alarms = Alarms()
    many = [finding(subject=f"rank {number}") for number in range(MAX_ALARMS + 10)]
    assert len(told(alarms, 10.0, *many)) == MAX_ALARMS
