"""The gRPC side of the agent: checks what ranks send, has it spooled, and acknowledges what is committed."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from trackagent.agent import producers
from trackagent.agent.access import Access, Sight, hide_node, hide_status
from trackagent.agent.config import AgentConfig
from trackagent.agent.interceptors import Discreet, Readable
from trackagent.agent.meeting import BadMeeting, Meetings, NoHub, NoRoom, Table
from trackagent.agent.owners import NotYours
from trackagent.agent.spool import OutOfOrder, Spool, SpoolError, SpoolFull, UnknownProducer
from trackagent.agent.store.contract import ProducerInfo, StoreError
from trackagent.client.errors import ConfigError as ClientConfigError
from trackagent.client.hub import Hub
from trackagent.client.segment import MAX_LANES, MAX_OFFSET
from trackagent.client.sender import PRODUCER_KEY
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

T = TypeVar("T")

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[object, object]

PROTOCOL_VERSION = 1
SERVICE = "trackagent.v1.Agent"
# Batches of one stream that may await their commit; then nothing more is read of it, and gRPC holds the
# rank back.
MAX_UNCOMMITTED = 32
# Producers that one stream may speak for (a rank: one; an agent that forwards: its ranks).
MAX_PRODUCERS = 1024
# What `trackagent status` says of batches that a damaged spool had, and whose runs nobody knows any more.
LOST_BATCHES = "batches of unknown runs, lost with a damaged spool"
# At the same time on one connection (a rank has two), and the headers of each.
MAX_CALLS = 128
MAX_METADATA_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class _Refused:
    """Why a call ends, as its caller is told."""

    code: grpc.StatusCode
    message: str


class _Commits:
    """What one stream has brought and not yet been told of, in order: a lane and its commit, or why a batch
    is refused; None at the end."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(MAX_UNCOMMITTED)
        self.producer_ids: set[bytes] = set()
        self._waiting: deque[tuple[int, Future[int]] | _Refused | None] = deque()
        self._changed = asyncio.Event()

    def add(self, item: tuple[int, Future[int]] | _Refused | None) -> None:
        """A commit: `look` must be called when it is done."""
        self._waiting.append(item)
        if not isinstance(item, tuple):
            self.look()

    def look(self) -> None:
        """Something may be there to be told."""
        self._changed.set()

    async def next(self) -> tuple[int, Future[int]] | _Refused | None:
        """Takes the oldest, when its commit is done, successfully or not."""
        while not self._waiting or not _is_done(self._waiting[0]):
            self._changed.clear()
            await self._changed.wait()
        self.slots.release()
        return self._waiting.popleft()


def _is_done(item: tuple[int, Future[int]] | _Refused | None) -> bool:
    return not isinstance(item, tuple) or item[1].done()


class _Uncommitted:
    """The bytes that await their commit, of all streams together, and what follows when it is done.

    The spool's thread is done with many at once. The event loop is woken once for all of them: it is the
    wake-up that costs.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._room = asyncio.Event()
        self._lock = threading.Lock()
        self._done: list[tuple[_Commits, int]] = []

    async def room(self, size: int) -> None:
        """Waits until so much more may be taken, or nothing is left to wait for."""
        while self._bytes and self._bytes + size > self._most:
            self._room.clear()
            await self._room.wait()

    def add(self, commit: Future[int], commits: _Commits, size: int) -> None:
        """A batch of the stream `commits`; it is told when this one is done."""
        loop = asyncio.get_running_loop()
        self._bytes += size

        def done(_: object) -> None:
            with self._lock:
                self._done.append((commits, size))
                first = len(self._done) == 1
            if first:
                loop.call_soon_threadsafe(self._settle)

        commit.add_done_callback(done)

    def _settle(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for commits, size in done:
            self._bytes -= size
            commits.look()
        self._room.set()


class Servicer(agent_pb2_grpc.AgentServicer):
    """The Agent service. `describe` fills in what the service itself does not know (sinks, losses,
    folders). access: what each user may do; None: only one can connect. look: how the node is to one who may
    see these producers (None: all), but for which ranks are connected; it may wait. route: which way a run
    goes whose rank 0 named a hub (Forwarding.route); it may wait. table: where ranks meet."""

    def __init__(
        self,
        spool: Spool,
        config: AgentConfig,
        version: str,
        describe: Callable[[agent_pb2.StatusResponse], Awaitable[None]],
        access: Access | None = None,
        look: Callable[[Sight | None], agent_pb2.NodeResponse] = lambda sees: (
            agent_pb2.NodeResponse()
        ),
        route: Callable[[str, Hub], str] = lambda run_id, hub: "",
        table: Table | None = None,
    ) -> None:
        self._spool = spool
        self._config = config
        self._version = version
        self._describe = describe
        self._access = access
        self._look = look
        self._route = route
        self._table = table or Meetings()
        self._streams = 0
        # Of users who do not run the agent; all others together under None.
        self._users_streams: Counter[int | None] = Counter()
        self._connected: Counter[bytes] = Counter()
        self._uncommitted = _Uncommitted(config.uncommitted_bytes)

    def is_connected(self, producer_id: bytes) -> bool:
        """Whether a stream is open that is the producer's or has brought something of it. From any thread."""
        return producer_id in self._connected

    def streams(self) -> int:
        """How many are open. From any thread."""
        return self._streams

    async def OpenRun(
        self, request: agent_pb2.OpenRunRequest, context: Context
    ) -> agent_pb2.OpenRunResponse:
        if request.protocol_version != PROTOCOL_VERSION:
            await _abort(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this agent ({self._version}) speaks protocol version {PROTOCOL_VERSION}, the client speaks "
                f"{request.protocol_version}: install the same trackagent on both sides",
            )
        try:
            info = producers.from_message(request.producer)
            held = _offsets(request.held)
            if info.sampled or info.reduced:
                raise producers.BadIdentity(
                    "sampled or reduced is set: only an agent samples and reduces"
                )
        except producers.BadIdentity as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if self._access is not None:
            owned = self._access.open(context.peer(), info.run_id, info.producer_id)
            await _permitted(owned, context)
        if request.HasField("hub"):
            info = dataclasses.replace(info, hub=await self._way(info, request.hub, context))
        committed = await _result(self._spool.open_producer(info, held, request.schemas), context)
        return agent_pb2.OpenRunResponse(
            agent_version=self._version,
            max_batch_bytes=self._config.max_batch_bytes,
            committed=[
                agent_pb2.LaneOffset(lane=lane, offset=offset)
                for lane, offset in committed.items()
                if lane < MAX_LANES
            ],
        )

    async def _way(
        self, info: ProducerInfo, address: agent_pb2.HubAddress, context: Context
    ) -> str:
        """As ProducerInfo.hub."""
        try:
            hub = Hub(address.address, address.pin, address.token)
            return await asyncio.to_thread(self._route, info.run_id, hub)
        except ClientConfigError as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except (sqlite3.Error, SpoolError):
            logger.exception("cannot note where the run %s goes", info.run_id)
            message = "this agent cannot note where the run goes; its log says why"
            await _abort(context, grpc.StatusCode.INTERNAL, message)

    async def Push(self, requests: AsyncIterator[agent_pb2.PushRequest], context: Context) -> None:
        if self._streams >= self._config.max_streams:
            await _abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this agent serves {self._streams} streams, its limit: raise max_streams",
            )
        user = None if self._access is None else self._access.guest(context.peer())
        if user is not None and self._users_streams[user] >= self._config.max_streams // 2:
            await _abort(
                context,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this agent serves {self._users_streams[user]} streams of yours, half of its limit",
            )
        self._streams += 1
        self._users_streams[user] += 1
        commits = _Commits()
        reader = asyncio.create_task(self._read(requests, commits, context.peer()))
        try:
            await self._greet(context, commits.producer_ids)
            while (item := await commits.next()) is not None:
                if isinstance(item, _Refused):
                    await _abort(context, item.code, item.message)
                lane, commit = item
                offset = await _result(commit, context)
                # Written, not yielded: a generator, and each that passes its answers on, costs more.
                await context.write(agent_pb2.PushResponse(lane=lane, offset=offset))
            await reader  # if it failed, the stream must not end as if all had been taken
        finally:
            self._streams -= 1
            self._users_streams[user] -= 1
            for producer_id in commits.producer_ids:
                self._connected[producer_id] -= 1
                if not self._connected[producer_id]:
                    del self._connected[producer_id]
            reader.cancel()

    async def _greet(self, context: Context, producer_ids: set[bytes]) -> None:
        """Whose stream it is, as its first words say: its rank may have nothing to send for long."""
        for key, producer_id in context.invocation_metadata() or ():
            if key == PRODUCER_KEY and isinstance(producer_id, bytes):
                # Who may not, or cannot be told yet, is refused when they send something.
                if await self._refusal(context.peer(), producer_id) is not None:
                    continue
                self._note_connected(producer_id, producer_ids)

    async def _refusal(self, peer: str, producer_id: bytes) -> _Refused | None:
        """Why the caller may not speak for a producer, None when they may."""
        if self._access is None:
            return None
        return await _refusal(self._access.check(peer, producer_id))

    def _note_connected(self, producer_id: bytes, producer_ids: set[bytes]) -> None:
        # Remembered for as long as the stream lasts; of another length, the spool knows none.
        room = len(producer_ids) < MAX_PRODUCERS and len(producer_id) == producers.ID_BYTES
        if room and producer_id not in producer_ids:
            producer_ids.add(producer_id)
            self._connected[producer_id] += 1

    async def _read(
        self, requests: AsyncIterator[agent_pb2.PushRequest], commits: _Commits, peer: str
    ) -> None:
        try:
            async for request in requests:
                await commits.slots.acquire()
                commits.add(await self._taken(request, commits, peer))
        finally:
            # Whatever ends the reading ends the answers.
            commits.add(None)

    async def _taken(
        self, request: agent_pb2.PushRequest, commits: _Commits, peer: str
    ) -> tuple[int, Future[int]] | _Refused:
        """The lane of a batch and its commit, or why it is refused."""
        size = len(request.journal_bytes)
        if not 0 < size <= self._config.max_batch_bytes or size % 8 or request.first_offset % 8:
            return _Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"a batch of {size} bytes at {request.first_offset}: expected whole records, "
                f"at most {self._config.max_batch_bytes} bytes",
            )
        if request.lane >= MAX_LANES or request.first_offset >= MAX_OFFSET:
            return _Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"offset {request.first_offset} of lane {request.lane}",
            )
        if request.producer_id not in commits.producer_ids:
            refused = await self._refusal(peer, request.producer_id)
            if refused is not None:
                return refused
            self._note_connected(request.producer_id, commits.producer_ids)
        await self._uncommitted.room(size)
        commit = self._spool.append(
            request.producer_id,
            request.lane,
            request.first_offset,
            request.journal_bytes,
            # Nobody waits for an acknowledgement: the journal holds the data as long.
            patient=True,
        )
        self._uncommitted.add(commit, commits, size)
        return request.lane, commit

    async def CloseRun(
        self, request: agent_pb2.CloseRunRequest, context: Context
    ) -> agent_pb2.CloseRunResponse:
        try:
            ends = _offsets(request.ends)
        except producers.BadIdentity as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if self._access is not None:
            await _permitted(self._access.check(context.peer(), request.producer_id), context)
        committed = await _result(self._spool.committed(request.producer_id), context)
        complete = all(committed.get(lane, 0) >= end for lane, end in ends.items())
        if complete:
            await _result(self._spool.end_producer(request.producer_id), context)
        return agent_pb2.CloseRunResponse(complete=complete)

    async def Status(
        self, request: agent_pb2.StatusRequest, context: Context
    ) -> agent_pb2.StatusResponse:
        response = agent_pb2.StatusResponse(agent_version=self._version)
        statistics = await _result(self._spool.statistics(), context)
        for name in ("batches", "bytes", "received_bytes"):
            setattr(response.spool, name, statistics[name])
        for sink in statistics["sinks"]:
            response.sinks.add(**sink)
        ranks = [one for one in statistics["producers"] if not one["info"].sampled]
        sees = await self._sight(context)
        if sees is not None:
            own = partial(_own, ranks, sees)
            ranks = await _permitted(asyncio.to_thread(own), context)
        for producer in ranks[:1000]:
            info: ProducerInfo = producer["info"]
            response.producers.add(
                producer=producers.to_message(info),
                committed_bytes=producer["committed_bytes"],
                state="connected" if self.is_connected(info.producer_id) else "disconnected",
            )
        await self._describe(response)
        if statistics["lost_batches"]:
            response.lost_records[LOST_BATCHES] = statistics["lost_batches"]
        if sees is not None:
            hide_status(response)
        return response

    async def Node(
        self, request: agent_pb2.NodeRequest, context: Context
    ) -> agent_pb2.NodeResponse:
        sees = await self._sight(context)
        response = await _permitted(asyncio.to_thread(self._look, sees), context)
        for run in response.runs:
            for rank in run.ranks:
                rank.connected = self.is_connected(rank.producer_id)
        if sees is not None:
            hide_node(response)
        return response

    async def _sight(self, context: Context) -> Sight | None:
        """What the caller may see, None: everything."""
        if self._access is None:
            return None
        try:
            return self._access.sight(context.peer())
        except NotYours as error:
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, str(error))

    async def Meet(
        self, request: agent_pb2.MeetRequest, context: Context
    ) -> agent_pb2.MeetResponse:
        if self._access is not None:
            await _permitted(self._access.own_job(context.peer(), request), context)
        try:
            return await self._table.meet(request)
        except BadMeeting as error:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except NoRoom as error:
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except NoHub as error:
            await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))


async def start(servicer: Servicer, address: str, max_batch_bytes: int) -> grpc.aio.Server:
    """Serves `servicer` and grpc.health.v1 at `address`. OSError when it cannot listen there."""
    server = grpc.aio.server(
        interceptors=[Discreet(), Readable()],
        options=[
            ("grpc.max_receive_message_length", max_batch_bytes + 64 * 1024),
            ("grpc.so_reuseport", 0),
            ("grpc.max_concurrent_streams", MAX_CALLS),
            ("grpc.max_metadata_size", MAX_METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ],
    )
    agent_pb2_grpc.add_AgentServicer_to_server(servicer, server)
    health = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen at {address}: {error}") from error
    await server.start()
    for service in ("", SERVICE):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    return server


async def _result(job: Future[T], context: Context) -> T:
    """What a job of the spool results in; ends the call where it fails."""
    try:
        return job.result() if job.done() else await asyncio.wrap_future(job)
    except SpoolFull as error:
        await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    except UnknownProducer as error:
        await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except OutOfOrder as error:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (SpoolError, sqlite3.Error) as error:
        await _abort(context, grpc.StatusCode.INTERNAL, f"the spool cannot commit: {error}")


async def _permitted(question: Awaitable[T], context: Context) -> T:
    """The answer; ends the call where the caller may not do this, or where it cannot be told."""
    try:
        return await question
    except _UNTOLD as error:
        refused = _refused(error)
        await _abort(context, refused.code, refused.message)


async def _refusal(question: Awaitable[None]) -> _Refused | None:
    try:
        await question
    except _UNTOLD as error:
        return _refused(error)
    return None


_UNTOLD = (NotYours, sqlite3.Error, StoreError)


def _refused(error: Exception) -> _Refused:
    if isinstance(error, NotYours):
        return _Refused(grpc.StatusCode.PERMISSION_DENIED, str(error))
    logger.warning("cannot tell whose run it is: %s", error)
    return _Refused(grpc.StatusCode.UNAVAILABLE, "cannot tell whose run it is: try again")


def _own(ranks: list[dict[str, Any]], sees: Sight) -> list[dict[str, Any]]:
    return [one for one in ranks if sees(one["info"].producer_id)]


async def _abort(context: Context, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
    raise AssertionError("abort returned")


def _offsets(offsets: object) -> dict[int, int]:
    found = {item.lane: item.offset for item in offsets}  # type: ignore[attr-defined]
    for lane, offset in found.items():
        if lane >= MAX_LANES or offset >= MAX_OFFSET or offset % 8:
            raise producers.BadIdentity(f"offset {offset} of lane {lane}")
    return found
