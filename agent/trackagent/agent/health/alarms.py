"""From what is wrong at each moment to what is told: once when it begins, once when it is over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

LEVELS = ("info", "warning", "error")
# A condition that comes and goes within this time is one.
CALM_S = 10.0
# More than that are not told one by one.
MAX_ALARMS = 1000


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong now. rule, subject and run_id say what, and stay the same as long as it lasts;
    run_id "": it concerns every run of this node. numbers: those that the rule compared, and what it compared
    them with."""

    rule: str
    subject: str
    level: str
    message: str
    numbers: dict[str, Any]
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be told: that it began or got worse, or, after `lasted_s`, that it is over."""

    finding: Finding
    over: bool
    lasted_s: float


@dataclass(slots=True)
class _Alarm:
    finding: Finding
    began_s: float
    seen_s: float


class Alarms:
    """Those that stand. Not thread-safe."""

    def __init__(self) -> None:
        self._standing: dict[tuple[str, str, str], _Alarm] = {}

    def standing(self) -> list[Finding]:
        """What is wrong, oldest first."""
        return [alarm.finding for alarm in self._standing.values()]

    def look(self, findings: Iterable[Finding], now_s: float) -> list[Change]:
        """What is to be told, when this is what is wrong at `now_s`."""
        changes = []
        for finding in findings:
            name = (finding.rule, finding.subject, finding.run_id)
            alarm = self._standing.get(name)
            if alarm is None:
                if len(self._standing) >= MAX_ALARMS:
                    continue
                self._standing[name] = _Alarm(finding, now_s, now_s)
                changes.append(Change(finding, over=False, lasted_s=0.0))
                continue
            if LEVELS.index(finding.level) > LEVELS.index(alarm.finding.level):
                changes.append(Change(finding, over=False, lasted_s=now_s - alarm.began_s))
            alarm.finding, alarm.seen_s = finding, now_s
        for name, alarm in list(self._standing.items()):
            if now_s - alarm.seen_s >= CALM_S:
                del self._standing[name]
                changes.append(Change(alarm.finding, over=True, lasted_s=now_s - alarm.began_s))
        return changes

    def forget(self, run_id: str) -> None:
        """The run has ended: what was wrong with it is not over, and not told any more."""
        for name in [name for name in self._standing if name[2] == run_id]:
            del self._standing[name]
