"""When the rules of this package fire."""

from __future__ import annotations

from dataclasses import dataclass

# Rule → what it tells of; docs/health.md explains each.
RULES = {
    "hang": "no rank's step moves any more",
    "straggler": "a rank is slower than the others",
    "nonfinite": "a metric is NaN or infinite",
    "spike": "a loss is far above its median",
    "silent_node": "nothing comes from a node while others log",
    "hardware": "a GPU, a link or a port fails or is throttled",
    "memory": "memory runs out, or the kernel killed for lack of it",
    "disk": "a file system is nearly full",
}


# What a hub judges, which knows the ranks of all nodes.
OF_RUNS = frozenset({"hang", "straggler", "nonfinite", "spike", "silent_node"})


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """As the agent's configuration gives them, under the same names; docs/health.md explains each rule."""

    hang_s: float = 60.0
    """How long no rank's step may stand still, at least."""

    hang_steps: float = 5.0
    """And at least this many times the longest of the recent steps."""

    straggler_ratio: float = 0.75
    """Fastest rank's median of a timer by a rank's own: below it, the rank is a straggler."""

    waiting_timers: str = "*reduce*,*gather*,*barrier*,*wait*,*sync*,*comm*"
    """Timers of phases in which a rank waits for others: there the culprit waits least."""

    spike_keys: str = "*loss*"
    """Metrics that are looked at for spikes."""

    spike_factor: float = 2.0
    """A value above this many medians is one of a spike."""

    spike_window: int = 100
    """Values of which the median is taken."""

    spike_patience: int = 4
    """Values in a row that make a spike."""

    finite_keys: str = "*"
    """Metrics that are to be finite."""

    memory_warning: float = 0.92
    """Part of the memory in use, of the node or of a control group, that is worth a warning."""

    memory_error: float = 0.97
    """And the part that is worth an error."""

    disk_error: float = 0.97
    """Part of a disk in use."""

    busy_percent: float = 50.0
    """Utilization of a GPU from which on throttling matters."""

    throttled_s: float = 10.0
    """How long a busy GPU is throttled before it is told."""

    silent_s: float = 60.0
    """How long nothing comes from a node while others of its run log."""
