"""The Hub service: takes what other nodes forward, for those who may deliver it, and hands it to the spool.

Whoever calls is believed nothing. Their bytes are read, within a deadline, once there is room for a whole
message, which counts until the call is answered; those who have yet to show that they may deliver have room
of their own, and hold nobody else up. Who may deliver is asked before anything is unpacked; then
each part is decoded, large ones on a thread, to see that a store could take it and that all its runs are
granted. What goes on to the spool is the part as it came.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import sqlite3
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from google.protobuf.message import DecodeError

from trackagent.agent import wire
from trackagent.agent.config import NODE_NAME
from trackagent.agent.errors import AgentError
from trackagent.agent.interceptors import WHAT_IS_WRONG
from trackagent.agent.listener import Peer
from trackagent.agent.meeting import BadMeeting, NoHub, NoRoom, Table
from trackagent.agent.refusals import Refusals
from trackagent.agent.shares import Callers, Host, Share
from trackagent.agent.spool import Overlaps, SpoolError, SpoolFull
from trackagent.agent.store.contract import Batch, BatchId, StoreError, node_run_id
from trackagent.agent.tokens import TokenTable
from trackagent.protos.v1 import agent_pb2, hub_pb2

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]

PROTOCOL_VERSION = 1
SERVICE = "trackagent.v1.Hub"
MAX_PARTS, MAX_GRANTS = 64, 1024
MAX_MESSAGE_BYTES = 17 * 1024 * 1024
MAX_SEQUENCE = 1 << 62
# Calls of one host that are under way, and that wait for their turn.
MAX_CALLS_OF_A_HOST, MAX_WAITING_OF_A_HOST = 8, 128
READ_TIMEOUT_S, TURN_TIMEOUT_S = 30.0, 30.0
# Hosts that the log names when they first deliver.
MAX_TOLD = 10_000
# Small calls that a hub takes well; and for how long it lets agents gather so that there are no more.
CALLS_PER_S, MAX_GATHER_S = 320, 10
# Unpacked, of a call: so much is checked in the loop, in less time than it takes to have a thread do it.
MAX_BYTES_HERE = 64 * 1024
# What calls hold of their messages until they are answered; one that is being read may become a whole one. Of
# those who have shown that they may deliver, and of strangers; and how many of a host are read at a time.
MAX_HELD_BYTES, MAX_READING_OF_A_HOST = 10 * MAX_MESSAGE_BYTES, 2
MAX_STRANGE_BYTES, MAX_READING_OF_A_STRANGE_HOST = 6 * MAX_MESSAGE_BYTES, 1
_ORIGIN = re.compile(r"[0-9a-f]{32}")
_BEARER = "Bearer "
_Code = grpc.StatusCode


class Receiving(Protocol):
    """The spool, as far as it takes what other agents forward."""

    def accept(self, id_: BatchId, part: bytes, node: str) -> Future[None]:
        """Commits a Part (hub.proto) of a node; changes nothing when its range came before. Fails with
        SpoolFull; with Overlaps where it never can; with SpoolError or sqlite3.Error otherwise."""
        ...

    def arrived(self, origin: str) -> Future[list[tuple[int, int]]]:
        """Which ranges (first, last) of another agent's spool came."""
        ...


class _Refused(Exception):
    """Why a call ends. shown: whether the hub's log says so too."""

    def __init__(self, code: grpc.StatusCode, message: str, shown: bool = True) -> None:
        super().__init__(message)
        self.code, self.message, self.shown = code, message, shown


@dataclass(frozen=True, slots=True)
class _Part:
    id: BatchId
    serialized: bytes


class Hub:
    """One for each agent that listens. peer: who is behind a call, as the listener knows; welcome: tells it
    that they may deliver; connected: how many hosts are; cluster_token: "" for none; version: this
    agent's."""

    def __init__(
        self,
        spool: Receiving,
        tokens: TokenTable,
        table: Table,
        refusals: Refusals,
        peer: Callable[[str], Peer | None],
        *,
        welcome: Callable[[str], None],
        connected: Callable[[], int],
        cluster_token: str,
        version: str,
        held_bytes: int = MAX_HELD_BYTES,
        strange_bytes: int = MAX_STRANGE_BYTES,
        read_timeout_s: float = READ_TIMEOUT_S,
        turn_timeout_s: float = TURN_TIMEOUT_S,
    ) -> None:
        self._spool, self._tokens, self._table = spool, tokens, table
        self._refusals, self._peer, self._welcome = refusals, peer, welcome
        self._connected = connected
        self._cluster_token = cluster_token.encode()
        self._version = version
        self._read_timeout_s, self._turn_timeout_s = read_timeout_s, turn_timeout_s
        calls = MAX_CALLS_OF_A_HOST
        self._known_ones = Callers(held_bytes, calls, MAX_READING_OF_A_HOST)
        self._strangers = Callers(strange_bytes, calls, MAX_READING_OF_A_STRANGE_HOST)
        self._threads = ThreadPoolExecutor(2, "hub")
        self._told: set[str] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """What a server needs to serve it. Requests are read here, and not by gRPC, which would hold as many
        of them as come."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Forward": self._served(hub_pb2.ForwardRequest, self._forward),
                "Known": self._served(hub_pb2.KnownRequest, self._known),
                "Meet": self._served(agent_pb2.MeetRequest, self._meet),
            },
        )

    def close(self) -> None:
        """After the server's end."""
        self._threads.shutdown()

    def _served(self, kind: Any, answer: Callable[..., Any]) -> Any:
        async def serve(_: object, context: Context) -> bytes:
            peer = self._peer(context.peer())
            if peer is None:
                await context.abort(_Code.UNAVAILABLE, "the connection has ended")
                raise AssertionError("abort returned")
            peer.calls += 1
            try:
                return await self._answered(kind, answer, peer, context)
            except _Refused as refused:
                if refused.shown:
                    self._refusals.tell(peer.host, refused.message)
                await context.abort(refused.code, refused.message)
                raise AssertionError("abort returned") from None
            finally:
                peer.calls -= 1

        return grpc.stream_unary_rpc_method_handler(serve)

    async def _answered(
        self, kind: Any, answer: Callable[..., Any], peer: Peer, context: Context
    ) -> bytes:
        """Serves a call in one of its host's turns. Its message is held until it is answered."""
        for_all = self._is_of_the_cluster(peer, context)
        if for_all:  # before its message, which may take longer than strangers have
            self._welcomed(peer, context)
        callers = self._known_ones if peer.welcome else self._strangers
        host = callers.of(peer.host)
        if host.calls >= MAX_CALLS_OF_A_HOST + MAX_WAITING_OF_A_HOST:
            raise _Refused(
                _Code.UNAVAILABLE,
                f"{host.calls} calls of this host are under way: come back",
            )
        host.calls += 1
        try:
            await self._turn(host.turns, 1)
            try:
                data = await self._read(host, callers.room, context)
                size = len(data)
                try:
                    answering = answer(_parsed(kind, data), peer, for_all, context)
                    del data  # the request has it, and this would be a second one
                    response = await answering
                    return bytes(response.SerializeToString())
                finally:
                    callers.room.give(size)
            finally:
                host.turns.give(1)
        finally:
            host.calls -= 1
            if not host.calls:
                del callers.hosts[peer.host]

    def _welcomed(self, peer: Peer, context: Context) -> None:
        if not peer.welcome:
            self._welcome(context.peer())

    async def _turn(self, share: Share, size: int) -> None:
        try:
            await share.take(size, self._turn_timeout_s)
        except asyncio.TimeoutError:
            raise _Refused(_Code.UNAVAILABLE, "the hub is busy: come back", False) from None

    async def _read(self, host: Host, room: Share, context: Context) -> bytes:
        """A call's message, for which room is taken."""
        await self._turn(host.reading, 1)
        try:
            # gRPC reads a message whole, and says its size then.
            await self._turn(room, MAX_MESSAGE_BYTES)
            size = 0
            try:
                data = await self._within_time(context)
                if not isinstance(data, bytes):
                    raise _Refused(_Code.INVALID_ARGUMENT, WHAT_IS_WRONG)
                size = len(data)
                return data
            finally:
                room.give(MAX_MESSAGE_BYTES - size)
        finally:
            host.reading.give(1)

    async def _within_time(self, context: Context) -> Any:
        """asyncio.wait_for would begin a task for each call."""
        task = asyncio.current_task()
        assert task is not None
        late: list[bool] = []
        timer = asyncio.get_running_loop().call_later(self._read_timeout_s, _cut_off, task, late)
        try:
            return await context.read()
        except asyncio.CancelledError:
            if not late:
                raise
            if sys.version_info >= (3, 11):
                task.uncancel()
            raise _Refused(
                _Code.DEADLINE_EXCEEDED,
                f"the message did not arrive within {self._read_timeout_s:g} s",
            ) from None
        finally:
            timer.cancel()

    # --- Forward

    async def _forward(
        self, request: hub_pb2.ForwardRequest, peer: Peer, for_all: bool, context: Context
    ) -> hub_pb2.ForwardResponse:
        runs = None if for_all else await self._granted(request.grants, peer, context)
        self._check_version(request.protocol_version)
        if not NODE_NAME.fullmatch(request.node):
            raise _Refused(
                _Code.INVALID_ARGUMENT,
                "node: expected 1 to 253 visible ASCII characters without blanks",
            )
        if not 0 < len(request.parts) <= MAX_PARTS:
            raise _Refused(
                _Code.INVALID_ARGUMENT, f"{len(request.parts)} parts: expected 1 to {MAX_PARTS}"
            )
        if sum(wire.unpacked_bytes(part.content) for part in request.parts) <= MAX_BYTES_HERE:
            parts = _checked(request.parts, runs)
        else:
            loop = asyncio.get_running_loop()
            parts = await loop.run_in_executor(self._threads, _checked, request.parts, runs)
        if peer.host not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(peer.host)
            logger.info("node %s (%s) delivers here", request.node, peer.host)
        commits = [self._spool.accept(part.id, part.serialized, request.node) for part in parts]
        # They stand in the request as well, and a commit may take its time.
        del request, parts
        for commit in commits:
            await _committed(commit)
        return hub_pb2.ForwardResponse(
            agent_version=self._version, gather_ms=gather_ms(self._connected())
        )

    async def _known(
        self, request: hub_pb2.KnownRequest, peer: Peer, for_all: bool, context: Context
    ) -> hub_pb2.KnownResponse:
        if not for_all:
            await self._granted(request.grants, peer, context)
        self._check_version(request.protocol_version)
        ranges = await _committed(self._spool.arrived(_origin(request.origin)))
        return hub_pb2.KnownResponse(last=max((last for _, last in ranges), default=0))

    async def _meet(
        self, request: agent_pb2.MeetRequest, peer: Peer, for_all: bool, context: Context
    ) -> agent_pb2.MeetResponse:
        if not for_all:
            raise _Refused(_Code.UNAUTHENTICATED, _unknown(self._cluster_token, [], context))
        try:
            return await self._table.meet(request)
        except BadMeeting as error:
            raise _Refused(_Code.INVALID_ARGUMENT, str(error)) from None
        except NoRoom as error:
            raise _Refused(_Code.RESOURCE_EXHAUSTED, str(error)) from None
        except NoHub as error:
            raise _Refused(_Code.UNAVAILABLE, str(error), False) from None

    def _check_version(self, version: int) -> None:
        if version != PROTOCOL_VERSION:
            raise _Refused(
                _Code.FAILED_PRECONDITION,
                f"this hub ({self._version}) speaks protocol version {PROTOCOL_VERSION}, the agent speaks "
                f"{version}: install the same trackagent on both nodes",
            )

    def _is_of_the_cluster(self, peer: Peer, context: Context) -> bool:
        """Whether the caller may deliver any run."""
        if peer.certified:
            return True
        said = _said_token(context)
        return bool(self._cluster_token) and hmac.compare_digest(said, self._cluster_token)

    async def _granted(
        self, grants: Sequence[hub_pb2.Grant], peer: Peer, context: Context
    ) -> frozenset[str]:
        """The runs that the caller may deliver."""
        if len(grants) > MAX_GRANTS:
            raise _Refused(
                _Code.INVALID_ARGUMENT, f"{len(grants)} grants: expected at most {MAX_GRANTS}"
            )
        try:
            if all(self._tokens.is_quick(one.run_id) for one in grants):
                runs = self._good(grants)
            else:
                runs = await asyncio.get_running_loop().run_in_executor(
                    self._threads, self._good, grants
                )
        except sqlite3.Error as error:
            logger.warning("cannot tell which run tokens are good: %s", error)
            raise _Refused(
                _Code.UNAVAILABLE, "cannot tell which tokens are good: try again", False
            ) from None
        if not runs:
            raise _Refused(_Code.UNAUTHENTICATED, _unknown(self._cluster_token, grants, context))
        self._welcomed(peer, context)
        return runs

    def _good(self, grants: Sequence[hub_pb2.Grant]) -> frozenset[str]:
        return frozenset(
            one.run_id for one in grants if self._tokens.is_good(one.run_id, one.token)
        )


def gather_ms(hosts: int) -> int:
    """For how long each of so many agents should gather between its calls, at least. A call costs a hub about
    as much with ten steps as with one."""
    return min(1000 * hosts // CALLS_PER_S, 1000 * MAX_GATHER_S)


def _said_token(context: Context) -> bytes:
    """The cluster's token as the caller says it."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str) and value.startswith(_BEARER):
            return value.removeprefix(_BEARER).encode()
    return b""


def _unknown(cluster_token: bytes, grants: Sequence[hub_pb2.Grant], context: Context) -> str:
    """Why a caller who is nobody is refused. Nothing of what they said is repeated but runs."""
    if _said_token(context) and not cluster_token:
        why = "this hub has no cluster token: start it with --token-file"
    elif _said_token(context):
        why = "the cluster token is not this hub's: give both agents the same --token-file"
    elif grants:
        named = grants[0].run_id if _ORIGIN.fullmatch(grants[0].run_id) else "this run"
        why = (
            f"this hub does not know this token of the run {named}: rank 0 has not connected to it yet, or "
            "it is another run's"
        )
    else:
        why = "neither a token nor a certificate by this hub's CA"
    return f"no right to deliver here: {why}"


def _parsed(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise _Refused(_Code.INVALID_ARGUMENT, WHAT_IS_WRONG) from None


def _origin(text: str) -> str:
    if not _ORIGIN.fullmatch(text):
        raise _Refused(_Code.INVALID_ARGUMENT, "origin: expected 32 lower-case hexadecimal digits")
    return text


def _checked(parts: Iterable[hub_pb2.Part], runs: frozenset[str] | None) -> list[_Part]:
    """The parts, if all can be stored and stand in `runs`."""
    found = []
    for part in parts:
        origin = _origin(part.origin)
        if not 1 <= part.first <= part.last < MAX_SEQUENCE:
            raise _Refused(
                _Code.INVALID_ARGUMENT, f"the range {part.first} to {part.last} of {origin}"
            )
        id_ = BatchId(origin, part.first, part.last)
        try:
            batch = wire.decode(part.content, id_)
        except wire.BadContent as error:
            raise _Refused(
                _Code.INVALID_ARGUMENT, f"{part.first} to {part.last} of {origin}: {error}"
            ) from None
        if runs is not None:
            _check_runs(batch, runs)
        found.append(_Part(id_, part.SerializeToString()))
    return found


def _check_runs(batch: Batch, runs: frozenset[str]) -> None:
    for info in batch.producers:
        of_node = info.sampled and info.run_id == node_run_id(info.node)
        if info.run_id not in runs and not of_node:
            raise _Refused(
                _Code.PERMISSION_DENIED, f"no grant covers the run {info.run_id} of these parts"
            )


async def _committed(job: Future[Any]) -> Any:
    try:
        return await asyncio.wrap_future(job)
    except SpoolFull as error:
        raise _Refused(_Code.RESOURCE_EXHAUSTED, str(error), False) from None
    except Overlaps as error:
        raise _Refused(_Code.INVALID_ARGUMENT, str(error)) from None
    except (SpoolError, sqlite3.Error) as error:
        raise _Refused(_Code.INTERNAL, f"the hub's spool cannot commit: {error}", False) from None
    except (AgentError, StoreError) as error:
        logger.warning("cannot tell what came of another agent before: %s", error)
        message = "the hub cannot tell yet what came before: come back"
        raise _Refused(_Code.UNAVAILABLE, message, False) from None


def _cut_off(task: asyncio.Task[Any], late: list[bool]) -> None:
    late.append(True)
    task.cancel()
