"""Reducing: what ranks logged, in one batch, becomes the points that are kept and partials of reductions.

Pure: a batch in, a batch out. Each value of a rank counts once over the node, and once over each group that
the rank is in. The hop that stores them adds one over all ranks: so such a curve is read from a few rows,
however many nodes there are, and nobody waits for the last rank: what comes later is one row more of the same
step. It also stores, of the ranks with the least and the greatest value that the batch has of a step, these
points as their own (keep "extremes"): partials name them, so that they travel at no cost.

Partials are points of a producer that stands for (run, attempt, job, ranks over which it reduces). Their keys
are those of ranks with SEPARATOR and the name of a stat, statistic by statistic.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from trackagent.agent import reduce
from trackagent.agent.policies import Definitions, Policies
from trackagent.agent.store.contract import Batch, Floats, Ints, Points, ProducerInfo
from trackagent.client.reductions import WEIGHT_KEY

SEPARATOR = "\x1f"
ALL = "all"
# Partials of so many keys go together: each key is eleven, and hubs take 4096 (decode.MAX_KEYS_TOGETHER).
MAX_KEYS_TOGETHER = 372
_NO_NODE = "-"


class Rows(NamedTuple):
    """Partials of the same keys: steps and times (n,), table (STATS, keys, n)."""

    steps: Ints
    times_ns: Ints
    table: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Reducer:
    """What an agent does with batches before a sink gets them. keep_all_ranks: runs of at most so many ranks
    keep every rank's points where nothing else is defined. stores: whether the sink is a store.
    keep_node_ranks: of runs of at most so many ranks it gets what each node has, too."""

    policies: Policies
    keep_all_ranks: int
    stores: bool
    keep_node_ranks: int = 1024

    def reduced(self, batch: Batch) -> Batch:
        """The batch as the sink is to get it; heeds what it defines itself. OSError: nothing is changed."""
        self.policies.learn(batch)
        return reduced(
            batch,
            self.policies,
            keep_all_ranks=self.keep_all_ranks,
            keep_node_ranks=self.keep_node_ranks,
            stores=self.stores,
        )


def reduced(
    batch: Batch,
    policies: Policies,
    *,
    keep_all_ranks: int,
    stores: bool,
    keep_node_ranks: int = 1024,
) -> Batch:
    """The batch with its ranks' points reduced, and its partials of the same step merged. What ranks have
    forked, what was sampled, and what stands in reductions already is left as it is."""
    infos = {info.producer_id: info for info in batch.producers}
    kept: list[Points] = []
    partials = _Partials()
    for points in batch.points:
        info = infos.get(points.producer_id)
        if info is not None and info.reduced and not points.reduced and is_partial(points.keys):
            partials.add(info, *from_points(points))
        elif info is None or info.sampled or info.forked or points.reduced or info.reduced:
            kept.append(points)
        else:
            kept += _taken(points, info, policies.of(info.run_id), keep_all_ranks, partials)
    if not partials:
        return replace(batch, points=kept)
    new: set[bytes] = set()
    if stores:
        new = partials.add_all_ranks(keep_node_ranks)
    merged = list(partials.merged())
    # Where what there is over all ranks was stored before, as when a run is copied, so were their points.
    over_all = [some for some in merged if some[0].producer_id in new]
    kept += _extremes(over_all, infos.values(), policies, keep_all_ranks)
    known = {**infos, **{info.producer_id: info for info, _, _ in merged}}
    made = [
        # So that nobody who is told of both, as when a run is copied, counts a node's values twice.
        replace(to_points(info.producer_id, keys, rows), reduced=stores and _is_of_a_node(info))
        for info, keys, rows in merged
    ]
    return replace(batch, producers=list(known.values()), points=[*kept, *made])


@lru_cache(256)
def is_partial(keys: tuple[str, ...]) -> bool:
    """Whether these are keys of partials, as `to_points` gives them."""
    return keys == _partial_keys(own_keys(keys))


def partial_key(key: str, stat: int) -> str:
    """The key under which a stat of a key is stored."""
    return f"{key}{SEPARATOR}{reduce.STATS[stat]}"


def to_points(producer_id: bytes, keys: tuple[str, ...], rows: Rows) -> Points:
    """Partials as points."""
    names = _partial_keys(keys)
    values = np.ascontiguousarray(rows.table.reshape(len(names), len(rows.steps)))
    return Points(producer_id, names, rows.steps, rows.times_ns, values)


def from_points(points: Points) -> tuple[tuple[str, ...], Rows]:
    """What `to_points` was given."""
    keys = own_keys(points.keys)
    table = points.values.reshape(len(reduce.STATS), len(keys), len(points.steps))
    return keys, Rows(points.steps, points.times_ns, table)


@lru_cache(256)
def _partial_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(partial_key(key, stat) for stat in range(len(reduce.STATS)) for key in keys)


@lru_cache(256)
def own_keys(partial_keys: tuple[str, ...]) -> tuple[str, ...]:
    """The keys whose partials stand under these."""
    count = len(partial_keys) // len(reduce.STATS)
    return tuple(key.rpartition(SEPARATOR)[0] for key in partial_keys[:count])


def _is_of_a_node(info: ProducerInfo) -> bool:
    return info.reduced.startswith("node ")


def weights_of(points: Points) -> Floats:
    """What each record says that it counts for; 1 where it says nothing, or nothing that is a weight."""
    if WEIGHT_KEY not in points.keys:
        return np.ones(len(points.steps))
    said = points.values[points.keys.index(WEIGHT_KEY)]
    return np.where((said >= 0) & (said < np.inf), said, 1.0)


def _taken(
    points: Points,
    info: ProducerInfo,
    definitions: Definitions,
    keep_all_ranks: int,
    partials: _Partials,
) -> Iterator[Points]:
    """The points of a rank that are kept as they are; the others are added to the partials."""
    groups: dict[tuple[str, int, bool], list[int]] = defaultdict(list)
    for at, key in enumerate(points.keys):
        if key == WEIGHT_KEY:
            continue
        policy = definitions.of(key)
        keep = policy.kept(info.world_size, keep_all_ranks)
        if policy.reduce == "none" and policy.every > 1:
            keep = "some"
        # Where all of it is kept, who reads can reduce it.
        unreduced = (keep, policy.every) == ("all", 1)
        weighted = unreduced or not definitions.unweighted(key)
        groups[keep, policy.every, weighted].append(at)
    if all((keep, every) == ("all", 1) for keep, every, _ in groups):
        yield points
        return
    weights = weights_of(points)
    for (keep, every, weighted), columns in groups.items():
        if (keep, every) == ("all", 1):
            beside = [at for at, key in enumerate(points.keys) if key == WEIGHT_KEY]
            yield _part(points, [*columns, *beside], slice(None))
            continue
        due = points.steps % every == 0
        if keep in ("all", "some") and due.any():
            yield replace(_part(points, columns, due), reduced=keep == "all")
        if keep == "some":  # and nothing else: it is not reduced
            continue
        ranks = np.full(len(points.steps), info.rank)
        counting = weights if weighted else np.ones(len(weights))
        for first in range(0, len(columns), MAX_KEYS_TOGETHER):
            part = columns[first : first + MAX_KEYS_TOGETHER]
            table = reduce.of_values(points.values[part], ranks, counting)
            keys = tuple(points.keys[at] for at in part)
            rows = Rows(points.steps, points.times_ns, table)
            for over in (f"node {info.node}", *(f"{name}={value}" for name, value in info.groups)):
                partials.add(over_ranks(info, over), keys, rows)


def _part(
    points: Points, columns: list[int], rows: slice | np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Points:
    keys = tuple(points.keys[at] for at in columns)
    values = np.ascontiguousarray(points.values[columns][:, rows])
    return Points(points.producer_id, keys, points.steps[rows], points.times_ns[rows], values)


def over_ranks(rank: ProducerInfo, over: str) -> ProducerInfo:
    """The producer that stands for some ranks of this one's attempt, or of that of another of these."""
    said = f"{rank.run_id} {rank.attempt} {rank.job_time_ns} {over}"
    return replace(
        rank,
        producer_id=hashlib.blake2b(said.encode(), digest_size=16).digest(),
        rank=0,
        local_rank=0,
        node=rank.node if over == f"node {rank.node}" else _NO_NODE,
        pid=0,
        start_time_ns=0,
        forked=False,
        groups=(),
        reduced=over,
    )


class _Partials:
    """Partials by producer and keys."""

    def __init__(self) -> None:
        self._infos: dict[bytes, ProducerInfo] = {}
        self._rows: dict[tuple[bytes, tuple[str, ...]], list[Rows]] = defaultdict(list)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, info: ProducerInfo, keys: tuple[str, ...], rows: Rows) -> None:
        self._infos.setdefault(info.producer_id, info)
        self._rows[info.producer_id, keys].append(rows)

    def add_all_ranks(self, keep_node_ranks: int) -> set[bytes]:
        """Of what nodes have, one over all of them; what they have stays in runs of at most so many ranks.
        Returns the producers of what was added."""
        alls: dict[tuple[str, int, int], ProducerInfo] = {}
        for (producer_id, keys), rows in list(self._rows.items()):
            info = self._infos[producer_id]
            if _is_of_a_node(info):
                attempt = info.run_id, info.attempt, info.job_time_ns
                if attempt not in alls:
                    alls[attempt] = over_ranks(info, ALL)
                for some in rows:
                    self.add(alls[attempt], keys, some)
                if info.world_size > keep_node_ranks:
                    del self._rows[producer_id, keys]
        return {info.producer_id for info in alls.values()}

    def merged(self) -> Iterator[tuple[ProducerInfo, tuple[str, ...], Rows]]:
        """One row for each step."""
        for (producer_id, keys), rows in self._rows.items():
            if len(rows) == 1:
                (one,) = rows
            else:
                steps, times, tables = zip(*rows, strict=True)
                one = Rows(
                    np.concatenate(steps), np.concatenate(times), np.concatenate(tables, axis=2)
                )
            yield self._infos[producer_id], keys, Rows(*reduce.by_step(*one))


def _extremes(
    merged: Sequence[tuple[ProducerInfo, tuple[str, ...], Rows]],
    infos: Iterable[ProducerInfo],
    policies: Policies,
    keep_all_ranks: int,
) -> Iterator[Points]:
    """The points of the ranks that hold the least and the greatest value of a step, for keys that keep them.
    A rank that the batch does not know is left out: the reduction names it all the same."""
    ranks: dict[tuple[str, int, int, float], bytes] = {
        (info.run_id, info.attempt, info.job_time_ns, info.rank): info.producer_id
        for info in infos
        if not (info.sampled or info.forked or info.reduced)
    }
    for info, keys, rows in merged:
        definitions = policies.of(info.run_id)
        attempt = info.run_id, info.attempt, info.job_time_ns
        for at, key in enumerate(keys):
            policy = definitions.of(key)
            if policy.kept(info.world_size, keep_all_ranks) != "extremes":
                continue
            due = rows.steps % policy.every == 0
            low, high = rows.table[reduce.MIN_RANK, at], rows.table[reduce.MAX_RANK, at]
            # Not numpy.unique, which imports a quarter of a second of other things.
            for rank in sorted({*low[due].tolist(), *high[due].tolist()}):
                producer_id = ranks.get((*attempt, rank))
                if producer_id is None:
                    continue
                held = due & ((low == rank) | (high == rank))
                values = np.where(
                    low == rank, rows.table[reduce.MIN, at], rows.table[reduce.MAX, at]
                )
                yield Points(
                    producer_id,
                    (key,),
                    rows.steps[held],
                    rows.times_ns[held],
                    values[held][None],
                    reduced=True,
                )
