"""What the watch knows of the runs, as `trackagent top` shows it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from trackagent.agent.health.settings import Thresholds
from trackagent.agent.health.training import scores
from trackagent.agent.health.views import RankView, RunView
from trackagent.agent.health.watch import Watch
from trackagent.agent.present import Progress, RankProgress, Standing


def progress(
    watch: Watch, thresholds: Thresholds, clock: Callable[[], float] = time.monotonic
) -> Progress:
    """Of all runs that go on. clock: the watch's."""
    now_s = clock()
    ranks: dict[bytes, RankProgress] = {}
    losses: dict[str, dict[str, list[float]]] = {}

    def describe(run: RunView) -> None:
        score = scores(run, thresholds)
        for number, rank in run.ranks.items():
            ranks[rank.info.producer_id] = _rank(rank, score.get(number), now_s)
        losses[run.run_id] = {key: list(values) for key, values in run.losses.items()}

    watch.describe(describe)
    standing = [
        Standing(one.rule, one.subject, one.level, one.message, one.run_id)
        for one in watch.standing()
    ]
    return Progress(ranks=ranks, losses=losses, standing=standing)


def _rank(rank: RankView, score: float | None, now_s: float) -> RankProgress:
    step_s = rank.step_time()
    moved = rank.step >= 0
    return RankProgress(
        step=rank.step if moved else None,
        still_s=max(0.0, now_s - rank.moved_s) if moved else None,
        step_s=None if math.isnan(step_s) else step_s,
        score=score,
    )
