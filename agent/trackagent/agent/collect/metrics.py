"""What is sampled, by name, unit and source: what docs/metrics.md lists and a test compares with it."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cached_property

from trackagent.agent.collect.table import COLLECTORS


@dataclass(frozen=True)
class Metric:
    """key: what it is called, names that the system gives in braces: `system/disk/{device}/busy_percent`.
    source: where it is read. mlflow, wandb: what these call it, "" where they have nothing like it; behind
    it, a factor between the units."""

    key: str
    unit: str
    meaning: str
    source: str
    mlflow: str = ""
    wandb: str = ""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the keys of samples match."""
        parts = re.split(r"\{\w+\}", self.key)
        return re.compile("[^/]+".join(map(re.escape, parts)))


def metrics_of(collector: str) -> tuple[Metric, ...]:
    """What a collector of the table can sample."""
    found: tuple[Metric, ...] = importlib.import_module(COLLECTORS[collector]).METRICS
    return found


def rows(metrics: tuple[Metric, ...]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| key | unit | what | from | MLflow | W&B |", "|---|---|---|---|---|---|"]
    for one in metrics:
        others = [f"`{name}`" if name else "" for name in (one.mlflow, one.wandb)]
        cells = [f"`{one.key}`", one.unit, one.meaning, one.source, *others]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return lines
