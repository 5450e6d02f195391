"""From samples to the spool: each source has a producer of its own, and a sample becomes a record of it.

So samples take the path of all records: durable with the commit that they share, in the store exactly
once. The id of a source's producer follows from the spool and the source; an agent that is started again goes
on with the same one. What cannot be kept, since the spool is full or does not answer, is counted as lost and
never waited for.

Threads: `record` may be called from several, for one source from several too; `end_others` from one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sqlite3
import struct
import threading
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
# What of one source may be on its way to the disk.
MAX_UNDER_WAY = 16
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
        # The ids whose keys are committed. Until then they go with each record.
        self.known: set[int] = set()
        self.under_way = 0
        self.lost: Counter[str] = Counter()


class Recorder:
    """Keeps samples of the node `node` in `spool`. claim: asked, with run and producer, before a producer is
    made known (Access.claim_own)."""

    def __init__(
        self, spool: Spool, node: str, *, claim: Callable[[str, bytes], None] | None = None
    ) -> None:
        self._spool = spool
        self._node = node
        self._claim = claim
        self._lock = threading.Lock()
        self._origin = ""
        self._sources: dict[bytes, _Source] = {}

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
        info = self._producer(sample)
        with self._lock:
            return self._sources.setdefault(info.producer_id, _Source(info))

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
                if source.under_way >= MAX_UNDER_WAY:
                    raise TimeoutError(f"{MAX_UNDER_WAY} samples are waiting")
                schema_id, encoded = _encoded(source, time_ns, values)
                source.under_way += 1
        except (FutureTimeout, TimeoutError, AgentError, sqlite3.Error) as error:
            logger.debug("cannot keep a sample of %s: %s", source.info.source, error)
            with source.lock:
                source.lost[_reason(error)] += 1
            return
        # Not under a lock: the spool's thread takes it to say that it is done.
        self._spool.append_next(source.info.producer_id, encoded).add_done_callback(
            lambda done: self._appended(source, schema_id, done)
        )

    def _open(self, source: _Source) -> None:
        """Makes the source known, and learns what its schema ids mean: an earlier agent has used some."""
        info = source.info
        if self._claim is not None:
            self._claim(info.run_id, info.producer_id)
        self._spool.open_producer(info, {}).result(PATIENCE_S)
        known = self._spool.schemas_of(info.producer_id).result(PATIENCE_S)
        with source.lock:
            source.known = set(known)
            source.schemas = {keys: schema_id for schema_id, keys in known.items()}
        source.open = True

    def _appended(self, source: _Source, schema_id: int | None, done: Future[int]) -> None:
        """On the spool's thread."""
        error = done.exception()
        with source.lock:
            source.under_way -= 1
            if error is not None:
                source.lost[_reason(error)] += 1
                if isinstance(error, UnknownProducer):
                    source.open = False  # the spool was damaged, and is another one
                return
            if schema_id is not None:
                source.known.add(schema_id)
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
        for info in here:
            if not info.sampled or info.producer_id in ours or info.run_id == run_id:
                continue
            self._spool.end_producer(info.producer_id)
            with self._lock:
                self._sources.pop(info.producer_id, None)


def _encoded(source: _Source, time_ns: int, values: dict[str, float]) -> tuple[int | None, bytes]:
    """The schema id and the record of these values, behind that of the schema where it may not be known."""
    keys, step = tuple(values), time_ns // 10**9
    if keys not in source.schemas:
        used = {one for one in source.schemas.values() if one is not None}
        free = (one for one in range(record.MAX_SCHEMAS) if one not in used)
        source.schemas[keys] = next(free, None)
        if len(source.schemas) > MAX_KEY_SETS:
            source.schemas = {one: id_ for one, id_ in source.schemas.items() if id_ is not None}
    schema_id = source.schemas.get(keys)
    if schema_id is None:
        return None, record.encode_named(keys, [*values.values()], step=step, time_ns=time_ns)
    before = b""
    if schema_id not in source.known:
        before = record.encode_schema(schema_id, keys, time_ns=time_ns)
    payload = struct.pack(f"<{len(keys)}d", *values.values())
    return schema_id, before + record.encode(
        record.Kind.METRICS,
        payload,
        step=step,
        time_ns=time_ns,
        schema_id=schema_id,
        count=len(keys),
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, SpoolFull):
        return FULL
    return SLOW if isinstance(error, (FutureTimeout, TimeoutError)) else FAILED
