"""What `trackagent show` says of samples: which keys are one line or one drawing, and which come first."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trackagent.agent.cli.output import byte_count, counted, number, print_table, safe, table

if TYPE_CHECKING:
    from rich.console import Console

    from trackagent.agent.store.contract import SeriesInfo

SHOWN_KEYS = 12
DRAWN_KEYS = 2
# Of one key, unless it is asked for: to read them takes 2 ms each in a run on a thousand nodes.
MOST_DRAWN = 256

Groups = dict[str, list["SeriesInfo"]]
"""Series by key; those of all GPUs under one, such as `gpu/*/power_watts`."""

# What people look at first, as patterns of keys: shown in this order, before all else ...
_FIRST = (
    "system/cpu/percent",
    "system/memory/used_percent",
    "gpu/*/utilization_percent",
    "gpu/*/memory_used_percent",
    "gpu/*/power_watts",
    "gpu/*/temperature_*",
    "process/cpu*percent",
    "process/*rss*",
    "cgroup/cpu/*percent",
    "cgroup/memory/*percent",
    "torch/*allocated*",
    "system/load_1m",
    "system/cpu/iowait_percent",
    "system/memory/used_bytes",
    "system/disk/*/*_bytes_per_second",
    "system/network/*/*_bytes_per_second",
    "infiniband/*_bytes_per_second",
    "process/*",
    "system/*",
)
# ... and drawn beside the curves of the training.
_DRAWN = ("gpu/*/utilization_percent", "system/cpu/percent", "process/cpu*percent")
_GPU = re.compile(r"^gpu/[^/]+/")
_KINDS = {"node": "node", "gpu": "GPU", "rank": "rank"}


def grouped(samples: Sequence[SeriesInfo]) -> Groups:
    """The series in the order in which keys are shown."""
    found: Groups = {}
    for one in samples:
        found.setdefault(_GPU.sub("gpu/*/", one.key), []).append(one)
    return dict(sorted(found.items(), key=lambda item: (_place(item[0], _FIRST), item[0])))


def drawn(groups: Groups, patterns: Sequence[str]) -> Groups:
    """What is drawn of it: what matches a pattern; without patterns one or two that people look at first, of
    which there is more than a moment, and no more than MOST_DRAWN."""
    if patterns:
        found = {
            group: [one for one in of if _matches(one.key, patterns) or _matches(group, patterns)]
            for group, of in groups.items()
        }
        return {group: of for group, of in found.items() if of}
    lasting = [
        group
        for group, of in groups.items()
        if _matches(group, _DRAWN)
        and len(of) <= MOST_DRAWN
        and any(one.first_step < one.last_step for one in of)
    ]
    lasting.sort(key=lambda group: _place(group, _DRAWN))
    return {group: groups[group] for group in lasting[:DRAWN_KEYS]}


def print_samples(out: Console, groups: Groups, *, every: bool) -> None:
    """One row a key, the first few or all."""
    if not groups:
        return
    shown = list(groups.items())[: None if every else SHOWN_KEYS]
    out.print("\nsamples", style="bold")
    rows = table("  key", "of", "last value")
    for group, of in shown:
        last = [one.last_value for one in of]
        # Compared as text: NaN is equal to nothing, not even to itself.
        ends = dict.fromkeys(_worded(group, value) for value in (min(last), max(last)))
        rows.add_row(safe(f"  {group}"), safe(_sources(of)), " to ".join(ends))
    print_table(out, rows)
    if len(groups) > len(shown):
        out.print(
            f"  and {counted(len(groups) - len(shown), 'more key')} (--samples lists them all)"
        )


def _sources(of: Sequence[SeriesInfo]) -> str:
    sources = sorted({one.source for one in of})
    kinds = {source.split()[0] for source in sources}
    if len(sources) == 1:
        return sources[0]
    return counted(len(sources), _KINDS.get(kinds.pop(), "source") if len(kinds) == 1 else "source")


def _worded(key: str, value: float) -> str:
    """In a unit that people read, where the key names one of bytes."""
    for end, per in (("_bytes", ""), ("_bytes_per_second", "/s")):
        if key.endswith(end) and 0 <= value < float("inf"):
            return f"{byte_count(value)}{per}"
    return number(value)


def _place(key: str, patterns: Sequence[str]) -> int:
    return next(
        (at for at, pattern in enumerate(patterns) if fnmatch.fnmatchcase(key, pattern)),
        len(patterns),
    )


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return _place(key, patterns) < len(patterns)
