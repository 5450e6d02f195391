"""What the embedded store says across ranks: partials that agents stored, and the points of ranks that stand
in none, merged. Functions of an open connection."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from trackagent.agent import reduce
from trackagent.agent.policies import Definitions, defined
from trackagent.agent.reducing import ALL, is_partial, own_keys, partial_key
from trackagent.agent.store import chunks, views
from trackagent.agent.store.contract import (
    ALL_RANKS,
    Floats,
    Ints,
    NotFound,
    Reduction,
    ReductionInfo,
    source_of,
)
from trackagent.client.reductions import DEFINITION, WEIGHT_KEY

# Partials that may be in memory before those of the same steps are merged.
_TOGETHER = 100_000
_SHOWN = 10
# What a count or a rank can be at most: a forwarded partial may say anything.
_MOST = 2.0**53


@dataclass(frozen=True, slots=True)
class Partials:
    """Partials of one key in one attempt: steps and times (n,), table (STATS, 1, n)."""

    attempt: int
    steps: Ints
    times_ns: Ints
    table: Floats


def of_run(connection: sqlite3.Connection, run: int, key: str, over: str) -> Reduction:
    """NotFound where nobody logged the key, or nobody of `over`."""
    definitions = _definitions(connection, run)
    world = _world(connection, run)
    ranks = world.ranks(over)
    partials = itertools.chain(
        _stored(connection, run, key, over),
        _own(connection, run, key, ranks, weighted=not definitions.unweighted(key)),
    )
    found = merged(key, over, definitions.of(key).reduce, partials, world.sizes(over))
    if not ranks or not len(found.steps):
        raise NotFound(_nothing(key, over, world))
    return found


def merged(
    key: str, over: str, shown: str, partials: Iterable[Partials], world_sizes: dict[int, int]
) -> Reduction:
    """Partials in any order as one reduction; world_sizes: of each attempt. Pure."""
    waiting: dict[int, list[Partials]] = defaultdict(list)
    most: dict[int, int] = defaultdict(lambda: _TOGETHER)
    for one in partials:
        rows = waiting[one.attempt]
        rows.append(one)
        if sum(len(some.steps) for some in rows) > most[one.attempt]:
            rows[:] = [_together(rows)]
            # What has many steps is not looked at again for each of few.
            most[one.attempt] = max(_TOGETHER, 2 * len(rows[0].steps))
    steps: Ints = np.empty(0, np.int64)
    times, sizes = steps, steps
    table: Floats = np.empty((len(reduce.STATS), 1, 0))
    for attempt in sorted(waiting, reverse=True):
        one = _together(waiting[attempt])
        new = ~np.isin(one.steps, steps)
        steps = np.concatenate([steps, one.steps[new]])
        times = np.concatenate([times, one.times_ns[new]])
        sizes = np.concatenate([sizes, np.full(int(new.sum()), world_sizes.get(attempt, 0))])
        table = np.concatenate([table, one.table[:, :, new]], axis=2)
    order = np.argsort(steps, kind="stable")
    table = table[:, :, order]
    stats = table[:, 0]
    count, nans, low, high = (
        np.clip(np.nan_to_num(stats[stat], nan=-1), -1, _MOST).astype(np.int64)
        for stat in (reduce.COUNT, reduce.NANS, reduce.MIN_RANK, reduce.MAX_RANK)
    )
    return Reduction(
        key=key,
        over=over,
        reduce=shown,
        steps=steps[order],
        times_ns=times[order],
        count=count,
        nans=nans,
        world_size=sizes[order],
        weight=stats[reduce.WEIGHT] + stats[reduce.WEIGHT_LOW],
        sum=stats[reduce.SUM],
        mean=reduce.mean(table)[0],
        std=reduce.std(table)[0],
        min=stats[reduce.MIN],
        max=stats[reduce.MAX],
        min_rank=low,
        max_rank=high,
    )


def _together(partials: list[Partials]) -> Partials:
    steps = np.concatenate([one.steps for one in partials])
    times = np.concatenate([one.times_ns for one in partials])
    table = np.concatenate([one.table for one in partials], axis=2)
    return Partials(partials[0].attempt, *reduce.by_step(steps, times, table))


# --- what is stored


def _stored(connection: sqlite3.Connection, run: int, key: str, over: str) -> Iterator[Partials]:
    """What agents reduced, without what is damaged."""
    names = [partial_key(key, stat) for stat in range(len(reduce.STATS))]
    for stream in views.reduced(connection, run, source_of(over)):
        if not set(names) <= set(stream.keys):
            continue
        places = [stream.keys.index(name) for name in names]
        for part in chunks.chunks_of(connection, stream.id, len(stream.keys)):
            with suppress(chunks.ChunkDamaged):
                yield Partials(
                    stream.attempt,
                    chunks.read_ints(connection, part, chunks.STEPS),
                    chunks.read_ints(connection, part, chunks.TIMES),
                    np.stack([chunks.read_floats(connection, part, at)[None] for at in places]),
                )


def _own(
    connection: sqlite3.Connection, run: int, key: str, ranks: set[bytes], *, weighted: bool
) -> Iterator[Partials]:
    """The points of these ranks that stand in no reduction, without what is damaged."""
    for stream in views.logged(connection, run):
        if stream.reduced or stream.producer_id not in ranks or key not in stream.keys:
            continue
        position = stream.keys.index(key)
        weighs = weighted and WEIGHT_KEY in stream.keys and key != WEIGHT_KEY
        for part in chunks.chunks_of(connection, stream.id, len(stream.keys)):
            with suppress(chunks.ChunkDamaged):
                weights = np.ones(part.n)
                if weighs:
                    at = stream.keys.index(WEIGHT_KEY)
                    said = chunks.read_floats(connection, part, at)
                    weights = np.where((said >= 0) & (said < np.inf), said, 1.0)
                values = chunks.read_floats(connection, part, position)
                yield Partials(
                    stream.attempt,
                    chunks.read_ints(connection, part, chunks.STEPS),
                    chunks.read_ints(connection, part, chunks.TIMES),
                    reduce.of_values(values[None], np.full(part.n, stream.rank), weights),
                )


@dataclass(frozen=True, slots=True)
class _Rank:
    """Who logs: a rank of an attempt."""

    producer_id: bytes
    attempt: int
    rank: int
    world_size: int
    node: str
    groups: frozenset[str]

    def is_in(self, over: str) -> bool:
        return over in (ALL, f"node {self.node}") or over in self.groups


@dataclass(frozen=True, slots=True)
class _World:
    """The ranks of a run."""

    every: list[_Rank]

    def ranks(self, over: str) -> set[bytes]:
        return {one.producer_id for one in self.every if one.is_in(over)}

    def sizes(self, over: str) -> dict[int, int]:
        """By attempt, how many ranks there are to report."""
        numbers: dict[int, set[int]] = defaultdict(set)
        worlds: dict[int, int] = defaultdict(int)
        for one in self.every:
            if one.is_in(over):
                numbers[one.attempt].add(one.rank)
                worlds[one.attempt] = max(worlds[one.attempt], one.world_size)
        return worlds if over == ALL else {one: len(ranks) for one, ranks in numbers.items()}

    def overs(self) -> list[str]:
        groups = sorted({group for one in self.every for group in one.groups})
        return [ALL, *sorted({f"node {one.node}" for one in self.every}), *groups]


def _world(connection: sqlite3.Connection, run: int) -> _World:
    rows = connection.execute(
        "SELECT producer_id, attempt, rank, world_size, node, in_groups FROM producers"
        " WHERE run = ? AND sampled = '' AND NOT forked",
        (run,),
    )
    return _World(
        [
            _Rank(id_, attempt, rank, world_size, node, _groups(groups))
            for id_, attempt, rank, world_size, node, groups in rows
        ]
    )


def _groups(said: str) -> frozenset[str]:
    return frozenset(f"{name}={value}" for name, value in json.loads(said or "{}").items())


def _definitions(connection: sqlite3.Connection, run: int) -> Definitions:
    rows = connection.execute(
        "SELECT key, value FROM tags WHERE run = ? AND key >= ? AND key < ?",
        (run, DEFINITION, DEFINITION + "\U0010ffff"),
    )
    return defined(dict(rows.fetchall()))


def _nothing(key: str, over: str, world: _World) -> str:
    overs = world.overs()
    if over in overs:
        unkept = ", or what nodes have is not kept in so large a run (keep_node_ranks)"
        where = "" if over == ALL else f" in {over!r}"
        return f"no rank logged {key!r}{where}{unkept if over.startswith('node ') else ''}"
    more = f" and {len(overs) - _SHOWN} more" if len(overs) > _SHOWN else ""
    return f"no ranks are in {over!r}; there is {', '.join(overs[:_SHOWN])}{more}"


# --- the list


@dataclass(slots=True)
class _Ends:
    """What is known of a key so far. last: attempt and greatest step."""

    first: int
    last: tuple[int, int]
    ranks: set[int]
    streams: list[views.Stream]
    reduced: bool


def infos(connection: sqlite3.Connection, run: int) -> list[ReductionInfo]:
    """Of every key, from what lists know of streams; of partials, the chunks with the last step are read."""
    definitions = _definitions(connection, run)
    world = _world(connection, run)
    ranks, sizes = world.ranks(ALL), world.sizes(ALL)
    bounds = {
        id_: (first, last)
        for id_, first, last in connection.execute(
            "SELECT t.id, t.first_step, t.last_step FROM producers p JOIN streams t ON t.producer = p.id"
            " WHERE p.run = ?",
            (run,),
        )
    }
    found: dict[str, _Ends] = {}

    def add(key: str, stream: views.Stream, *, partial: bool) -> None:
        first, step = bounds[stream.id]
        last = step, stream.attempt
        known = found.get(key)
        if known is None or last > known.last:
            least = first if known is None else min(known.first, first)
            reduced = known is not None and known.reduced
            known = found[key] = _Ends(least, last, set(), [], reduced)
        known.reduced |= partial
        known.first = min(known.first, first)
        if last == known.last:
            if partial:
                known.streams.append(stream)
            else:
                known.ranks.add(stream.rank)

    for stream in views.logged(connection, run):
        if not stream.reduced and stream.producer_id in ranks:
            for key in stream.keys:
                if key != WEIGHT_KEY and definitions.of(key).reduce != "none":
                    add(key, stream, partial=False)
    for stream in views.reduced(connection, run, ALL_RANKS):
        if is_partial(stream.keys):
            for key in own_keys(stream.keys):
                add(key, stream, partial=True)
    return [
        ReductionInfo(
            key,
            definitions.of(key).reduce,
            one.first,
            one.last[0],
            len(one.ranks) + _reported(connection, key, one.last[0], one.streams),
            sizes.get(one.last[1], 0),
            one.reduced,
        )
        for key, one in sorted(found.items())
    ]


def _reported(
    connection: sqlite3.Connection, key: str, step: int, streams: list[views.Stream]
) -> int:
    """How many values partials have of a key at a step."""
    total = 0.0
    for stream in streams:
        places = [stream.keys.index(partial_key(key, at)) for at in (reduce.COUNT, reduce.NANS)]
        for part in chunks.chunks_of(connection, stream.id, len(stream.keys), within=(step, step)):
            with suppress(chunks.ChunkDamaged):
                at = chunks.read_ints(connection, part, chunks.STEPS) == step
                for place in places:
                    total += float(np.nansum(chunks.read_floats(connection, part, place)[at]))
    return int(min(max(total, 0.0), _MOST))
