"""Which collectors there are, and which of them a configuration asks for."""

from __future__ import annotations

import difflib

# Name in the configuration → the module that has it, imported when it is used: its `make(here)` gives the
# collector, or raises contract.Unavailable, and its METRICS say what it samples.
COLLECTORS = {
    "system": "trackagent.agent.collect.system",
    "cgroup": "trackagent.agent.collect.cgroup",
    "processes": "trackagent.agent.collect.processes",
    "infiniband": "trackagent.agent.collect.infiniband",
    "gpu": "trackagent.agent.collect.gpu",
}
ALL, NONE = "all", "none"
# Steps of samples are whole seconds.
MIN_INTERVAL_S, MAX_INTERVAL_S = 1.0, 3600.0


def intervals(asked: str, interval_s: float) -> dict[str, float]:
    """By collector that `asked` (AgentConfig.collect) names, how often it samples, in seconds; `interval_s`
    where that says nothing else. ValueError says what is wrong."""
    if asked.strip() == NONE:
        return {}
    if asked.strip() == ALL:
        return dict.fromkeys(COLLECTORS, interval_s)
    found: dict[str, float] = {}
    for part in asked.split(","):
        name, equals, text = (piece.strip() for piece in part.partition("="))
        if name not in COLLECTORS:
            near = difflib.get_close_matches(name, COLLECTORS, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}" if near else f"give all, none, or {_names()}"
            raise ValueError(f"there is no collector {name!r}: {known}")
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = _seconds(text, name) if equals else interval_s
    return found


def _names() -> str:
    return ", ".join(COLLECTORS)


def _seconds(text: str, name: str) -> float:
    try:
        seconds = float(text)
        # Written so that NaN is refused too.
        if not MIN_INTERVAL_S <= seconds <= MAX_INTERVAL_S:
            raise ValueError
    except ValueError:
        limits = f"{MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} seconds"
        raise ValueError(f"the interval of {name} is {text!r}: give {limits}") from None
    return seconds
