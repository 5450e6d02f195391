"""From samples to the spool: each source has a producer of its own, and a sample becomes a record of it.

So samples take the path of all records: durable with the commit that they share, in the store exactly
once. The id of a source's producer follows from the spool and the source; an agent that is started again goes
on with the same one. What cannot be kept, since the spool is full or does not answer, is counted as lost and
never waited for.

The first sample of a source is kept at once, later ones some seconds together: in the spool and in a store
it is the pieces that cost, not what they hold. An agent that is killed takes what it holds with it.

Threads: `record` may be called from several, for one source from several too; the rest from one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import sqlite3
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from trackagent.agent import notices
from trackagent.agent.collect.contract import Sample
from trackagent.agent.errors import AgentError
from trackagent.agent.spool import Spool, SpoolFull, UnknownProducer
from trackagent.agent.store.contract import ProducerInfo, node_run_id
from trackagent.client import record

logger = logging.getLogger(__name__)

# The experiment of what is sampled on nodes; no run of anybody's.
EXPERIMENT = "trackagent-nodes"
# How long samples are held to be kept together, and how many bytes of one source.
HOLD_S = 5.0
MAX_HELD_BYTES = 256 * 1024
# How many pieces of one source may be on their way to the disk.
MAX_UNDER_WAY = 4
# Remembered of one source, those without a schema id too.
MAX_KEY_SETS = 2 * record.MAX_SCHEMAS
# How long the spool may take to make a new source known.
PATIENCE_S = 5.0

# Reasons by which lost samples are counted.
FULL = "samples: the spool was full"
SLOW = "samples: the spool did not keep up"
FAILED = "samples: the spool failed"


class _Source:
    """One producer that is sampled."""

    def __init__(self, info: ProducerInfo) -> None:
        self.info = info
        # Held while the spool is asked; never by the spool's own thread.
        self.opening = threading.Lock()
        self.open = False
        # For what follows; never held for long.
        self.lock = threading.Lock()
        # Key sets and their schema ids; None: no id is left, and the names go with each record.
        self.schemas: dict[tuple[str, ...], int | None] = {}
        # The ids whose keys are committed. Until then they go with each piece.
        self.known: set[int] = set()
        # Records that are not yet on their way, and the ids that they use. When the last were sent, by
        # time.monotonic(), and in which period of HOLD_S.
        self.held: list[bytes] = []
        self.held_ids: set[int] = set()
        self.held_bytes = 0
        self.sent_at = -math.inf
        self.period = -1
        self.under_way = 0
        self.lost: Counter[str] = Counter()


class Recorder:
    """Keeps samples of the node `node` in `spool`. claim: asked, with run and producer, before a producer is
    made known (Access.claim_own). hold_s: how long samples are held."""

    def __init__(
        self,
        spool: Spool,
        node: str,
        *,
        claim: Callable[[str, bytes], None] | None = None,
        hold_s: float = HOLD_S,
    ) -> None:
        self._spool = spool
        self._node = node
        self._claim = claim
        self._hold_s = hold_s
        self._lock = threading.Lock()
        self._origin = ""
        self._sources: dict[bytes, _Source] = {}
        # The same by what they are of: a rank's producer id, or a GPU. To compute their ids takes a while.
        self._known: dict[bytes | str, _Source] = {}

    def record(self, time_ns: int, samples: Sequence[Sample]) -> None:
        """Begins to keep samples of one moment; returns without waiting for the disk, but for a source of
        which nothing was kept yet."""
        try:
            self._learn_origin()
        except (FutureTimeout, AgentError, sqlite3.Error) as error:
            logger.warning("cannot keep samples yet: the spool does not say its name: %s", error)
            return
        for sample in samples:
            if sample.values:
                self._record(self._source(sample), time_ns, sample.values)

    def _learn_origin(self) -> None:
        if not self._origin:
            self._origin = self._spool.origin().result(PATIENCE_S)

    def _source(self, sample: Sample) -> _Source:
        of = sample.gpu if sample.rank is None else sample.rank.producer_id
        source = self._known.get(of)
        if source is None:
            info = self._producer(sample)
            with self._lock:
                source = self._sources.setdefault(info.producer_id, _Source(info))
                self._known[of] = source
        return source

    def _producer(self, sample: Sample) -> ProducerInfo:
        rank = sample.rank
        if rank is not None:
            id_ = self._id(f"rank {rank.producer_id.hex()}")
            return dataclasses.replace(rank, producer_id=id_, sampled=f"rank {rank.rank}")
        source = f"gpu {self._node}:{sample.gpu}" if sample.gpu else f"node {self._node}"
        return ProducerInfo(
            producer_id=self._id(source),
            run_id=node_run_id(self._node),
            attempt=1,
            rank=0,
            local_rank=0,
            world_size=1,
            node=self._node,
            pid=0,
            start_time_ns=0,
            experiment=EXPERIMENT,
            run_name=self._node,
            forked=False,
            sampled=source,
        )

    def _id(self, source: str) -> bytes:
        """Another spool never has the same one: its lanes are others."""
        named = f"trackagent samples {self._origin} {source}"
        return hashlib.blake2b(named.encode(), digest_size=16).digest()

    def _record(self, source: _Source, time_ns: int, values: dict[str, float]) -> None:
        try:
            with source.opening:
                if not source.open:
                    self._open(source)
            with source.lock:
                _hold(source, time_ns, values)
        except (FutureTimeout, TimeoutError, AgentError, sqlite3.Error) as error:
            logger.debug("cannot keep a sample of %s: %s", source.info.source, error)
            with source.lock:
                source.lost[_reason(error)] += 1
            return
        # All sources at the same moments, for one commit.
        period = time_ns // max(1, int(self._hold_s * 1e9))
        if period != source.period or not self._hold_s:
            source.period = period
            self._send(source)

    def send_due(self, *, all_held: bool = False) -> None:
        """Sends on its way what is held for long, or everything: of a source that is sampled no more, nobody
        else does."""
        due = time.monotonic() - self._hold_s
        with self._lock:
            sources = list(self._sources.values())
        for source in sources:
            if source.held and (all_held or source.sent_at < due):
                self._send(source)

    def _send(self, source: _Source) -> None:
        with source.lock:
            records, ids = source.held, source.held_ids
            source.held, source.held_ids, source.held_bytes = [], set(), 0
            source.sent_at = time.monotonic()
            if not records:
                return
            if source.under_way >= MAX_UNDER_WAY:
                source.lost[SLOW] += len(records)
                return
            source.under_way += 1
            keys = {id_: keys for keys, id_ in source.schemas.items() if id_ in ids - source.known}
        now = time.time_ns()
        schemas = [record.encode_schema(id_, keys[id_], time_ns=now) for id_ in sorted(keys)]
        # Not under a lock: the spool's thread takes it to say that it is done.
        self._spool.append_next(
            source.info.producer_id, b"".join(schemas + records)
        ).add_done_callback(lambda done: self._appended(source, len(records), ids, done))

    def _open(self, source: _Source) -> None:
        """Makes the source known, and learns what its schema ids mean: an earlier agent has used some."""
        info = source.info
        if self._claim is not None:
            self._claim(info.run_id, info.producer_id)
        self._spool.open_producer(info, {}).result(PATIENCE_S)
        known = self._spool.schemas_of(info.producer_id).result(PATIENCE_S)
        with source.lock:
            if source.held:  # under ids that another spool knew
                source.lost[FAILED] += len(source.held)
                source.held, source.held_ids, source.held_bytes = [], set(), 0
            source.known = set(known)
            source.schemas = {keys: schema_id for schema_id, keys in known.items()}
        source.open = True

    def _appended(self, source: _Source, records: int, ids: set[int], done: Future[int]) -> None:
        """On the spool's thread."""
        error = done.exception()
        with source.lock:
            source.under_way -= 1
            if error is not None:
                source.lost[_reason(error)] += records
                if isinstance(error, UnknownProducer):
                    source.open = False  # the spool was damaged, and is another one
                return
            source.known |= ids
            lost, source.lost = source.lost, Counter()
        if lost:
            encoded = notices.lost_samples(lost)
            self._spool.append_own(source.info.producer_id, encoded).add_done_callback(
                lambda told: self._told(source, lost, told)
            )

    def _told(self, source: _Source, lost: Counter[str], told: Future[int]) -> None:
        if told.exception() is not None:
            with source.lock:
                source.lost += lost

    def end_others(self, here: Sequence[ProducerInfo]) -> None:
        """Ends what is sampled of ranks that are no longer here, and what an earlier agent sampled and this
        one does not. here: all that have not ended (Active.producers)."""
        self._learn_origin()
        ours = {self._id(f"rank {info.producer_id.hex()}") for info in here if not info.sampled}
        run_id = node_run_id(self._node)

        def is_over(info: ProducerInfo) -> bool:
            return info.producer_id not in ours and info.run_id != run_id

        with self._lock:
            over = [source for source in self._sources.values() if is_over(source.info)]
            for source in over:
                del self._sources[source.info.producer_id]
            self._known = {of: one for of, one in self._known.items() if one not in over}
        for source in over:
            self._send(source)
        for info in here:
            if info.sampled and is_over(info):
                self._spool.end_producer(info.producer_id)


def _hold(source: _Source, time_ns: int, values: dict[str, float]) -> None:
    """Adds the record of these values to what is held. TimeoutError when there is too much of it."""
    keys, step = tuple(values), time_ns // 10**9
    if source.held_bytes > MAX_HELD_BYTES:
        raise TimeoutError(f"{source.held_bytes} bytes of samples are waiting")
    if keys not in source.schemas:
        used = {one for one in source.schemas.values() if one is not None}
        free = (one for one in range(record.MAX_SCHEMAS) if one not in used)
        source.schemas[keys] = next(free, None)
        if len(source.schemas) > MAX_KEY_SETS:
            source.schemas = {one: id_ for one, id_ in source.schemas.items() if id_ is not None}
    schema_id = source.schemas.get(keys)
    if schema_id is None:
        encoded = record.encode_named(keys, [*values.values()], step=step, time_ns=time_ns)
    else:
        source.held_ids.add(schema_id)
        encoded = record.encode(
            record.Kind.METRICS,
            struct.pack(f"<{len(keys)}d", *values.values()),
            step=step,
            time_ns=time_ns,
            schema_id=schema_id,
            count=len(keys),
        )
    source.held.append(encoded)
    source.held_bytes += len(encoded)


def _reason(error: BaseException) -> str:
    if isinstance(error, SpoolFull):
        return FULL
    return SLOW if isinstance(error, (FutureTimeout, TimeoutError)) else FAILED
