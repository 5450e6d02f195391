"""What every store does: take batches once, and answer questions about runs and series.

Writing: one thread, one batch at a time. `write` returns when the whole batch is durable (fsynced) and
visible to readers; a batch whose id was written before changes nothing. Any exception means that nothing of
the batch was kept, except `Rejected`: the batch can never be written, do not retry. Batches arrive in any
order.

Reading: any thread or process, also while a batch is written; a reader sees whole batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Sources of reductions.
ALL_RANKS = "all ranks"
_RANKS_OF = "ranks of "


class StoreError(Exception):
    """A store could not do what was asked; the message says what to do next."""


class Rejected(StoreError):
    """This batch can never be written; keep it aside with the reason."""


class NotFound(StoreError):
    """No such run, or more than one run matches."""


# --- what is written -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class BatchId:
    """Range [first, last] of spool sequence numbers of the spool `origin`: ranges of one origin never overlap
    unless one lies in the other, and then they are of the same content."""

    origin: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class ProducerInfo:
    """Who logs; the fields of trackagent.v1.Producer. `attempt` is the job's count. Where several jobs
    continued one run, a store counts on over them, in order of job_time_ns; of a producer that does not know
    its job (0), the last of them counts.

    sampled: "" for a process that logs. Else this is an agent that samples, and this the source of what it
    samples: `rank 3`, of a process of the run; or `node a` and `gpu a:0`, in the run `node_run_id("a")`,
    which is no run of anybody's: each run sees of it what was sampled on its nodes while it was there. The
    steps of samples are whole seconds since 1970-01-01 UTC, and they do not count as records of the run.

    groups: (name, value) of the named groups that the rank is in, by name. reduced: "" for a process that
    logs. Else an agent reduces what ranks log, and this is over which of them: "all", "node a", "tp=0"; its
    keys are reduce.py's, and they count nowhere in the run. hub: the pin of the hub that rank 0 named, ""
    for none; it says which way the records go, and stores ignore it."""

    producer_id: bytes
    run_id: str
    attempt: int
    rank: int
    local_rank: int
    world_size: int
    node: str
    pid: int
    start_time_ns: int
    experiment: str
    run_name: str
    forked: bool
    job_time_ns: int = 0
    sampled: str = ""
    groups: tuple[tuple[str, str], ...] = ()
    reduced: str = ""
    hub: str = ""

    @property
    def source(self) -> str:
        """The source of this producer's series: `rank 3`, or `rank 3 pid 4711` for what a rank forked."""
        if self.sampled:
            return self.sampled
        if self.reduced:
            return source_of(self.reduced)
        return f"rank {self.rank} pid {self.pid}" if self.forked else f"rank {self.rank}"


def source_of(over: str) -> str:
    """The source of what agents reduce over these ranks: `all ranks`, or `ranks of tp=0`."""
    return ALL_RANKS if over == "all" else f"{_RANKS_OF}{over}"


def scope_of(source: str) -> str:
    """Over what an agent reduces whose source this is; "" for any other source."""
    if source == ALL_RANKS:
        return "all"
    return source[len(_RANKS_OF) :] if source.startswith(_RANKS_OF) else ""


def node_run_id(node: str) -> str:
    """The id under which what is sampled on a node is kept: 32 hexadecimal digits."""
    return hashlib.blake2b(f"trackagent node {node}".encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Points:
    """Values that one producer logged together: keys sharing steps and times, in order of arrival.

    steps: (n,), times_ns: (n,) nanoseconds since 1970-01-01 UTC, values: (len(keys), n) float64, bit-exact
    (NaN payloads and -0.0 included). reduced: these values stand in reductions too, which are points of a
    producer that reduces; who reduces what is stored leaves them out. Of what a node's ranks have together:
    it stands in the reduction over all ranks too.
    """

    producer_id: bytes
    keys: tuple[str, ...]
    steps: Ints
    times_ns: Ints
    values: Floats
    reduced: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """A param or a tag. Params are write-once: a second, different value is not stored but becomes
    an event of level "warning"; an equal one changes nothing. Of two tags the one with the later
    time stays."""

    producer_id: bytes
    key: str
    value: str
    time_ns: int


@dataclass(frozen=True, slots=True)
class EventData:
    """Something that happened in a run. level: "info", "warning" or "error"; step None: no step.
    `data`: further fields as JSON."""

    producer_id: bytes
    time_ns: int
    level: str
    message: str
    step: int | None = None
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProducerEnd:
    """How a producer ended: status "finished", "failed" or "killed"; error "" or the exception in one line;
    logged: number of metric records it says it logged, -1 when it could not say. The first end of a producer
    stays, except that "killed" gives way to what the producer itself said."""

    producer_id: bytes
    time_ns: int
    status: str
    error: str
    logged: int


@dataclass(frozen=True, slots=True)
class Loss:
    """`records` of a producer were lost for `reason`. more: True: `records` are in addition to what was
    counted before; False: the count from the producer's beginning, the largest stays. A reason counted in
    both ways has lost the largest count and all additions together. Where nobody knows how many were
    lost, they count as 1; the event that comes with it says what is known."""

    producer_id: bytes
    reason: str
    records: int
    more: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """`records` log calls that a producer refused, for `reason`, between two that got through, at steps from
    first_step to last_step. A gap with the same reason and first_time_ns as one before is that one, grown: of
    each figure the largest stays, of first_step the least. Where a producer has more than 1000, the oldest
    become one."""

    producer_id: bytes
    reason: str
    first_step: int
    last_step: int
    first_time_ns: int
    last_time_ns: int
    records: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one range of the spool says, in order of arrival within each kind. Every producer_id occurs in
    `producers` of this batch or of one written before. metric_records: for each producer the number of metric
    records (log calls) whose values stand in `points`. includes: the ranges of other agents' spools of which
    it was made; `Reader.ranges` knows them once the batch is written. parts: what other agents forwarded
    and nobody has read yet (wire.py), each with the producer that stands for its agent; no store gets any.
    history: the producers of which what stands here was copied from another store: it happened long ago."""

    id: BatchId
    producers: Sequence[ProducerInfo] = ()
    params: Sequence[Setting] = ()
    tags: Sequence[Setting] = ()
    events: Sequence[EventData] = ()
    points: Sequence[Points] = ()
    ends: Sequence[ProducerEnd] = ()
    losses: Sequence[Loss] = ()
    gaps: Sequence[Gap] = ()
    metric_records: dict[bytes, int] = field(default_factory=dict)
    includes: Sequence[BatchId] = ()
    parts: Sequence[tuple[ProducerInfo, bytes]] = ()
    history: frozenset[bytes] = frozenset()


# --- what is read ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run as lists show it. status: "running" while any rank of the last attempt has not ended;
    then "failed" if any failed, else "killed" if any was killed, else "finished" (forked producers
    decide nothing). records_logged: sum of what ended producers say they logged, None while a rank is
    running or when one could not say; of a forked producer that has not said, what it stored counts."""

    run_id: str
    name: str
    experiment: str
    status: str
    attempt: int
    world_size: int
    start_time_ns: int
    end_time_ns: int | None
    error: str
    ranks: int
    series: int
    points: int
    records_stored: int
    records_logged: int | None
    lost_records: int


@dataclass(frozen=True, slots=True)
class Event:
    """An event as read: `source` as in ProducerInfo.source, `id` increasing in order of arrival."""

    id: int
    time_ns: int
    level: str
    source: str
    step: int | None
    message: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunGap:
    """A Gap as read: steps of `source` in `attempt` at which records are missing."""

    source: str
    attempt: int
    reason: str
    first_step: int
    last_step: int
    first_time_ns: int
    last_time_ns: int
    records: int


@dataclass(frozen=True, slots=True)
class SeriesInfo:
    """One series of a run: key and source, number of points, first and last step, last value by step."""

    key: str
    source: str
    points: int
    first_step: int
    last_step: int
    last_value: float


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one series ordered by step (equal steps by time, then in order of arrival); for a (key,
    source, step) that several attempts logged, the last attempt's. All arrays (n,).
    """

    key: str
    source: str
    steps: Ints
    times_ns: Ints
    values: Floats


@dataclass(frozen=True, slots=True)
class Buckets:
    """A series drawn in at most as many buckets as asked for, each over an equal number of points (the last
    may have fewer); NaN values count in `count` but not in min, max and mean. All arrays (buckets,)."""

    key: str
    source: str
    first_step: Ints
    last_step: Ints
    count: Ints
    mean: Floats
    min: Floats
    max: Floats


@dataclass(frozen=True, slots=True)
class ReductionInfo:
    """A key that ranks logged and that can be looked at across them. reduce: what is shown first, "mean",
    "sum", "min" or "max"; reported: how many values the last step has, of world_size ranks of its attempt.
    reduced: of some or all steps there are reductions, and not every rank's own points."""

    key: str
    reduce: str
    first_step: int
    last_step: int
    reported: int
    world_size: int
    reduced: bool


@dataclass(frozen=True, slots=True)
class Reduction:
    """A key across ranks, by ascending step: of a step that several attempts logged, the last one's. over:
    "all", "node a", or a group such as "tp=0". All arrays (n,).

    count and nans: the values that are numbers, and those that are NaN and count nowhere else; together they
    are at most world_size, the ranks of that attempt that there are to report, where each logs the key once
    a step. weight: the sum of their weights; sum, mean and std are weighted (keys whose reduce is "sum" are
    not), std is the population's. min_rank and max_rank: the ranks that hold min and max, of several the
    lowest; -1 and NaN where no value is a number. times_ns: the latest."""

    key: str
    over: str
    reduce: str
    steps: Ints
    times_ns: Ints
    count: Ints
    nans: Ints
    world_size: Ints
    weight: Floats
    sum: Floats
    mean: Floats
    std: Floats
    min: Floats
    max: Floats
    min_rank: Ints
    max_rank: Ints


@dataclass(frozen=True, slots=True)
class ExportBlock:
    """Points of one source for several keys as stored, attempts and repeated steps included. rank -1 and
    attempt 0: of a node or a GPU."""

    source: str
    rank: int
    attempt: int
    keys: tuple[str, ...]
    steps: Ints
    times_ns: Ints
    values: Floats  # (len(keys), n)


class Writer(Protocol):
    """The side that one sink holds."""

    def write(self, batch: Batch) -> None: ...

    def last_written(self, origin: str) -> int:
        """The greatest `last` of the batches of `origin` that were written, 0 for none."""
        ...

    def compact(self, deadline_s: float) -> bool:
        """Merges small pieces for at most about `deadline_s` seconds; True when more is left to do."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """The side that people and pages use.

    What agents sampled makes no run and changes none: it is in `samples_list`, `series`, `buckets`, `damage`,
    and `export` where asked for. A run sees what was sampled of its own processes, and of the nodes where
    its ranks were, from the second in which the first began there to the one in which the last ended. Events
    of these nodes and times are the run's as well. Under `node_run_id`, all of a node's samples and events
    are found, with steps as written.
    """

    def runs(
        self, *, experiment: str | None = None, status: str | None = None, limit: int = 100
    ) -> list[RunSummary]:
        """Newest first."""
        ...

    def run(self, name: str) -> RunSummary:
        """By run id, a unique prefix of one (at least 4 digits), `latest`, or the run's name where unique.
        NotFound otherwise; the message lists candidates."""
        ...

    def params(self, run_id: str) -> dict[str, str]: ...

    def tags(self, run_id: str) -> dict[str, str]: ...

    def losses(self, run_id: str) -> dict[str, int]: ...

    def all_losses(self) -> dict[str, int]:
        """Those of all runs together, and those of what was sampled."""
        ...

    def attempts(self, run_id: str) -> list[int]:
        """The run's own numbers of those that anyone has logged in, ascending."""
        ...

    def gaps(self, run_id: str) -> list[RunGap]:
        """In the order of their first times."""
        ...

    def events(self, run_id: str, after: int = 0) -> list[Event]: ...

    def series_list(self, run_id: str) -> list[SeriesInfo]:
        """Ordered by key, then by source (numbers in it as numbers)."""
        ...

    def samples_list(self, run_id: str) -> list[SeriesInfo]:
        """The same of what was sampled, but for what a rank logged under the same key. Steps, here and
        below: whole seconds since that in which the run began."""
        ...

    def series(self, run_id: str, key: str, source: str) -> Series:
        """Logged or sampled. NotFound where there is none."""
        ...

    def buckets(self, run_id: str, key: str, source: str, buckets: int) -> Buckets: ...

    def export(
        self, run_id: str, *, skip: dict[str, int] | None = None, samples: bool = False
    ) -> Iterator[ExportBlock]:
        """Every point that ranks logged; samples: every one that was sampled instead. In bounded memory.
        `skip` is a cursor that the call fills and a later call takes to get only what arrived since (pass the
        same empty dict each time, one for each of the two); samples that a run did not see then, since they
        lay outside its time, are passed over for good."""
        ...

    def damage(self, run_id: str) -> list[str]:
        """What of a run can no longer be read, and `series`, `buckets` and `export` therefore leave out:
        each a line with points, keys, source and reason. Reads every point of the run, in bounded memory."""
        ...

    def reductions_list(self, run_id: str) -> list[ReductionInfo]:
        """Of all keys that ranks logged, by key; without those that are defined not to be reduced."""
        ...

    def reduction(self, run_id: str, key: str, over: str = "all") -> Reduction:
        """Of what is stored as reductions and of ranks' points that stand in none. NotFound where there is
        nothing; the message lists over what there is."""
        ...

    def copies(self, run_id: str, known: Callable[[str], int]) -> Iterator[Batch]:
        """All that ranks logged and agents reduced of a run, its params, tags, events and ends, for another
        store: known(origin) is up to where that one has what this one said under an origin, 0 for nothing.
        The same is always said under the same ids; a run that goes on may be copied again. What was sampled
        on nodes is left out. In bounded memory."""
        ...

    def ranges(self, origin: str) -> list[tuple[int, int]]:
        """Which ranges (first, last) of `origin` were written, as batches or included in some, ascending;
        neighbouring ones are one."""
        ...

    def close(self) -> None: ...
