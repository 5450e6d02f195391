"""Rules about a run: pure functions from what is known of it to what is wrong with it now."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from trackagent.agent.health.alarms import Finding
from trackagent.agent.health.settings import Thresholds
from trackagent.agent.health.views import RankView, RunView, matches

# Of a timer, before its median says something.
LEAST_TIMED = 10
# And what a straggler costs at least: less is not worth an event.
LEAST_SECONDS = 0.001
LEAST_OF_STEP = 0.02
# A run without a rhythm yet cannot have lost it.
LEAST_STEPS = 3
NAMED = 8


def findings(run: RunView, thresholds: Thresholds, now_s: float) -> list[Finding]:
    """What is wrong with `run` at `now_s`, up to which everything that its ranks sent has been seen."""
    return [
        *hang(run, thresholds, now_s),
        *silent_nodes(run, thresholds, now_s),
        *stragglers(run, thresholds),
        *not_finite(run),
        *spikes(run, thresholds),
    ]


def hang(run: RunView, thresholds: Thresholds, now_s: float) -> list[Finding]:
    """No rank's step has moved for long. First to stop are those that are behind the others; where all are at
    one step, those that came to it clearly before the others."""
    ranks = [rank for rank in run.ranks.values() if rank.moved_ns]
    intervals = [interval for rank in ranks for interval in rank.intervals]
    if len(intervals) < LEAST_STEPS:
        return []
    limit_s = max(thresholds.hang_s, thresholds.hang_steps * max(intervals))
    still_s = now_s - max(rank.moved_s for rank in ranks)
    if still_s <= limit_s:
        return []
    behind = min(rank.step for rank in ranks)
    ahead = max(rank.step for rank in ranks)
    if behind < ahead:
        first = [rank for rank in ranks if rank.step == behind]
    else:
        begun = min(rank.moved_ns for rank in ranks)
        near_ns = int(0.5e9 * statistics.median(intervals))
        first = [rank for rank in ranks if rank.moved_ns <= begun + near_ns]
    first.sort(key=lambda rank: rank.info.rank)
    who = "all ranks" if len(first) == len(ranks) else f"first {_named(first)}"
    message = (
        f"no rank's step has moved for {still_s:.0f} s: {who} stopped at step {first[0].step}"
        + (f", others came to step {ahead}" if behind < ahead else "")
        + f" (the longest recent step took {max(intervals):.3g} s)"
    )
    numbers = {
        "still_s": round(still_s, 1),
        "limit_s": round(limit_s, 1),
        "longest_step_s": max(intervals),
        "first_ranks": [rank.info.rank for rank in first],
        "first_nodes": sorted({rank.info.node for rank in first}),
        "step": first[0].step,
        "last_step": ahead,
    }
    return [Finding("hang", "", "error", message, numbers, run.run_id)]


def silent_nodes(run: RunView, thresholds: Thresholds, now_s: float) -> list[Finding]:
    """Nothing comes from any rank of a node, while others of the run are heard."""
    heard: dict[str, float] = {}
    for rank in run.ranks.values():
        heard[rank.info.node] = max(heard.get(rank.info.node, -math.inf), rank.heard_s)
    if not heard or now_s - max(heard.values()) > thresholds.silent_s / 2:
        return []
    found = []
    for node, last_s in sorted(heard.items()):
        silent_s = now_s - last_s
        if silent_s > thresholds.silent_s:
            there = {r.info.rank: r.step for r in run.ranks.values() if r.info.node == node}
            ranks = sorted(there)
            named = ", ".join(f"{rank} (last step {there[rank]})" for rank in ranks[:NAMED])
            message = (
                f"nothing has come from node {node} for {silent_s:.0f} s, while others of its run log: "
                f"ranks {named}{' …' if len(ranks) > NAMED else ''}"
            )
            numbers = {
                "silent_s": round(silent_s, 1),
                "limit_s": thresholds.silent_s,
                "ranks": ranks,
                "last_steps": [there[rank] for rank in ranks],
            }
            found.append(Finding("silent_node", node, "error", message, numbers, run.run_id))
    return found


def stragglers(run: RunView, thresholds: Thresholds) -> list[Finding]:
    """Ranks that are slower than the fastest in a phase, by its timer; in a phase of waiting for others, the
    rank that waits least. Of a rank's phases the one that costs most is told."""
    worst: dict[int, tuple[float, Finding]] = {}
    names = sorted({name for rank in run.ranks.values() for name in rank.timers})
    for waiting in (False, True):
        for name in names:
            if matches(name, thresholds.waiting_timers) != waiting:
                continue
            medians = {
                number: statistics.median(rank.timers[name])
                for number, rank in run.ranks.items()
                if len(rank.timers.get(name, ())) >= LEAST_TIMED
            }
            if len(medians) < 2:
                continue
            judged = _waits_least if waiting else _slow
            for number, cost_s, finding in judged(run, name, medians, thresholds):
                known = worst.get(number)
                if known is None or (known[0] < cost_s and not waiting):
                    worst[number] = (cost_s, finding)
    return [finding for _, (_, finding) in sorted(worst.items())]


def _slow(
    run: RunView, name: str, medians: dict[int, float], thresholds: Thresholds
) -> Iterable[tuple[int, float, Finding]]:
    fastest = min(medians, key=medians.__getitem__)
    for number, own_s in medians.items():
        cost_s = own_s - medians[fastest]
        if own_s <= 0 or not _matters(run.ranks[number], cost_s):
            continue
        ratio = medians[fastest] / own_s
        if ratio >= thresholds.straggler_ratio:
            continue
        slower = own_s / medians[fastest] - 1 if medians[fastest] > 0 else math.inf
        message = (
            f"rank {number} on node {run.ranks[number].info.node} is a straggler in {name}: it takes "
            f"{own_s:.3g} s, {slower:.0%} more than rank {fastest} with {medians[fastest]:.3g} s"
        )
        numbers = _compared(number, name, own_s, fastest, medians[fastest], ratio, thresholds)
        yield number, cost_s, _straggler(run, number, message, numbers)


def _waits_least(
    run: RunView, name: str, medians: dict[int, float], thresholds: Thresholds
) -> Iterable[tuple[int, float, Finding]]:
    least = min(medians, key=medians.__getitem__)
    others_s = statistics.median(value for number, value in medians.items() if number != least)
    cost_s = others_s - medians[least]
    ratio = medians[least] / others_s if others_s > 0 else 1.0
    if ratio >= thresholds.straggler_ratio or not _matters(run.ranks[least], cost_s):
        return
    message = (
        f"rank {least} on node {run.ranks[least].info.node} is a straggler: in {name} the others wait "
        f"{others_s:.3g} s and it waits {medians[least]:.3g} s, so they wait for it {cost_s:.3g} s a step"
    )
    numbers = _compared(least, name, medians[least], None, others_s, ratio, thresholds)
    yield least, cost_s, _straggler(run, least, message, numbers)


def _matters(rank: RankView, cost_s: float) -> bool:
    step_s = rank.step_time()
    share_s = 0.0 if math.isnan(step_s) else LEAST_OF_STEP * step_s
    return cost_s >= max(LEAST_SECONDS, share_s)


def _compared(
    rank: int,
    phase: str,
    own_s: float,
    other: int | None,
    other_s: float,
    ratio: float,
    thresholds: Thresholds,
) -> dict[str, object]:
    return {
        "rank": rank,
        "phase": phase,
        "median_s": own_s,
        "compared_with_rank": other,
        "compared_with_s": other_s,
        "ratio": round(ratio, 4),
        "limit": thresholds.straggler_ratio,
    }


def _straggler(run: RunView, rank: int, message: str, numbers: dict[str, object]) -> Finding:
    return Finding("straggler", f"rank {rank}", "warning", message, numbers, run.run_id)


def scores(run: RunView, thresholds: Thresholds) -> dict[int, float]:
    """How quick each rank is beside the fastest: the least, over its timers, of the fastest rank's median by
    its own; phases of waiting left out. 1: none is faster. Ranks without timers are left out."""
    found: dict[int, float] = {}
    for name in {name for rank in run.ranks.values() for name in rank.timers}:
        if matches(name, thresholds.waiting_timers):
            continue
        medians = {
            number: statistics.median(rank.timers[name])
            for number, rank in run.ranks.items()
            if rank.timers.get(name)
        }
        fastest_s = min(medians.values())
        for number, own_s in medians.items():
            if own_s > 0:
                found[number] = min(found.get(number, 1.0), fastest_s / own_s)
    return found


def not_finite(run: RunView) -> list[Finding]:
    """Metrics whose last value is NaN or infinite on some rank."""
    found = []
    for key, bad in sorted(run.not_finite.items()):
        step, rank = min((one.step, rank) for rank, one in bad.items())
        value = bad[rank].value
        more = f", now on {len(bad)} ranks" if len(bad) > 1 else ""
        message = f"{key} is {value} on rank {rank} from step {step} on{more}"
        numbers = {
            "key": key,
            "rank": rank,
            "step": step,
            "value": str(value),
            "ranks": sorted(bad)[:NAMED],
        }
        found.append(Finding("nonfinite", key, "error", message, numbers, run.run_id))
    return found


def spikes(run: RunView, thresholds: Thresholds) -> list[Finding]:
    """Metrics far above their own median, for some values in a row."""
    found = []
    high: dict[str, list[int]] = {}
    for (key, rank), spike in run.spikes.items():
        if spike.most >= thresholds.spike_patience:
            high.setdefault(key, []).append(rank)
    for key, ranks in sorted(high.items()):
        rank = min(ranks)
        spike = run.spikes[key, rank]
        message = (
            f"{key} spikes: {spike.value:.4g} on rank {rank} at step {spike.step}, "
            f"{spike.value / spike.median:.2g} times the median {spike.median:.4g} of the last "
            f"{len(spike.window)} values, for {spike.most} values in a row"
        )
        numbers = {
            "key": key,
            "rank": rank,
            "ranks": sorted(ranks)[:NAMED],
            "step": spike.step,
            "value": spike.value,
            "median": spike.median,
            "limit": thresholds.spike_factor,
            "in_a_row": spike.most,
        }
        found.append(Finding("spike", key, "warning", message, numbers, run.run_id))
    return found


def _named(ranks: list[RankView]) -> str:
    shown = ", ".join(f"{r.info.rank} (node {r.info.node})" for r in ranks[:NAMED])
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"
