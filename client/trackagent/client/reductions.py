"""What ranks say of how their values are reduced: weights, definitions and groups, checked and made plain.

A weight travels as one more value of its record, under WEIGHT_KEY. A definition travels as a tag, named
DEFINITION and the pattern, with JSON {"reduce": ..., "keep": ..., "every": ...}: so both survive what records
and tags survive. Groups are part of the producer's identity.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from trackagent.client import values
from trackagent.client.errors import ValueRefused

WEIGHT_KEY = "trackagent/weight"
DEFINITION = "trackagent/define/"
REDUCTIONS = ("mean", "sum", "min", "max", "none")
KEPT = ("all", "extremes", "none")
MAX_GROUPS = 8
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# As fnmatch reads one: a ] that comes first, or after !, is one of its characters.
_SET = re.compile(r"\[(?:!(.[^\]]*)|([^!][^\]]*))\]")
_RANGE = re.compile(r"(.)-(.)")


def to_weight(weight: Any) -> float:
    """`weight` as a number of 0 or more; of 0, a value has no part in means."""
    number = values.to_float("weight", weight)
    if not 0 <= number < math.inf:
        problem = (
            f"the weight {number} is no number of 0 or more: give how much the values stand for"
        )
        raise ValueRefused("bad weight", problem)
    return number


class RefusedWeight:
    """Stands in a record for a weight that is none, so that it is refused as other values are."""

    def __init__(self, error: ValueRefused) -> None:
        self._error = error

    def __float__(self) -> float:
        raise self._error


def definition(pattern: Any, reduce: Any, keep: Any, every: Any) -> tuple[str, str]:
    """The tag, name and text, that defines how keys which match are reduced."""
    values.check_key(pattern, "pattern")
    name = values.check_key(f"{DEFINITION}{pattern}", "pattern")
    _check_sets(pattern)
    if reduce not in REDUCTIONS:
        raise _bad(f"reduce is {values.shown(reduce)}: one of {', '.join(REDUCTIONS)}")
    if keep is not None and keep not in KEPT:
        raise _bad(f"keep is {values.shown(keep)}: one of {', '.join(KEPT)}")
    if reduce == "none" and keep not in (None, "all"):
        raise _bad(f"reduce is none and keep is {keep}: nothing would be left; reduce or keep all")
    try:
        number = values.to_step(every)
    except ValueRefused:
        number = 0
    if number < 1:
        raise _bad(f"every is {values.shown(every)}: a whole number of 1 or more")
    return name, json.dumps({"reduce": reduce, "keep": keep, "every": number})


def to_groups(groups: Any) -> dict[str, str]:
    """Names and values of groups as text: 1 to 64 letters, digits, dots, hyphens and underscores each."""
    if groups is None:
        return {}
    if not isinstance(groups, Mapping) or len(groups) > MAX_GROUPS:
        problem = f"groups is {values.shown(groups)}: a dict of at most {MAX_GROUPS} names"
        raise ValueRefused("bad groups", problem)
    found = {}
    for name, value in groups.items():
        text = str(value) if isinstance(value, (str, int)) else ""
        if not (isinstance(name, str) and _NAME.fullmatch(name) and _NAME.fullmatch(text)):
            raise ValueRefused(
                "bad groups",
                f"the group {values.shown(name)}: {values.shown(value)} is none: name and value are 1 to 64 "
                "letters, digits, dots, hyphens and underscores, such as tp=0",
            )
        found[name] = text
    return found


def _check_sets(pattern: str) -> None:
    """Refuses what fnmatch takes for something that nobody means."""
    at = 0
    while (at := pattern.find("[", at)) >= 0:
        found = _SET.match(pattern, at)
        if found is None:
            raise _bad(
                f"the pattern {values.shown(pattern)} has a [ that no ] closes: close it, or write [[] "
                "for one that stands in the key"
            )
        for first, last in _RANGE.findall(found[1] or found[2]):
            if first > last:
                raise _bad(
                    f"the pattern {values.shown(pattern)} has the range {first}-{last}, in which nothing is: "
                    f"write {last}-{first}"
                )
        at = found.end()


def _bad(problem: str) -> ValueRefused:
    return ValueRefused("bad definition", problem)
