"""The small tables in which the ranks of a job agree on a run, where nothing else lets them: the hub's, or
the agent's own on a single node (rpc Meet). In memory: ranks of a job that goes on have agreed already.

Bounded in jobs, keys and bytes; what a job has is forgotten a day after its last use.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from trackagent.agent.errors import AgentError
from trackagent.protos.v1 import agent_pb2, hub_pb2_grpc

FORGOTTEN_AFTER_S = 86_400.0
MAX_JOBS, MAX_KEYS = 1024, 8192
MAX_BYTES = 64 * 1024 * 1024
MAX_NAME, MAX_VALUE_BYTES = 250, 4096
TIMEOUT_S = 10.0
# Calls to another hub that are under way.
MAX_ASKING = 256
# Of each key, beside what it holds.
_KEY_BYTES = 200
_MOST = 1 << 63

Operation = agent_pb2.MeetRequest.Operation


class BadMeeting(AgentError):
    """What is asked breaks a limit, or makes no sense."""


class NoRoom(AgentError):
    """The tables are full."""


class NoHub(AgentError):
    """The hub in whose tables ranks are to meet does not answer, or not as it should; they may ask again."""


@dataclass(slots=True)
class _Job:
    used_at: float
    values: dict[str, bytes] = field(default_factory=dict)


class Table(Protocol):
    """Where ranks meet, in one event loop."""

    async def meet(self, request: agent_pb2.MeetRequest) -> agent_pb2.MeetResponse:
        """Takes one step. BadMeeting, NoRoom, NoHub."""
        ...

    def close(self) -> None: ...


class Meetings:
    """The tables of all jobs, here. clock: seconds that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # In the order of their last use.
        self._jobs: dict[str, _Job] = {}
        self._bytes = 0

    async def meet(self, request: agent_pb2.MeetRequest) -> agent_pb2.MeetResponse:
        """Takes one step. BadMeeting, NoRoom."""
        _check(request)
        now = self._clock()
        self._forget(now)
        job = self._jobs.pop(request.job, None) or _Job(now)
        job.used_at = now
        try:
            found = self._changed(job, request)
        finally:
            if job.values:
                self._jobs[request.job] = job
        return agent_pb2.MeetResponse(found=found is not None, value=found or b"")

    def close(self) -> None:
        """Nothing is kept."""

    def _changed(self, job: _Job, request: agent_pb2.MeetRequest) -> bytes | None:
        """What stands at the key afterwards."""
        there = job.values.get(request.key)
        match request.operation:
            case Operation.GET:
                return there
            case Operation.SET:
                new = request.value
            case Operation.ADD:
                new = _sum(there, request.amount)
            case Operation.COMPARE_SET:
                if (there or b"") != request.expected or (there == b"" and not request.expected):
                    return there
                new = request.value
            case other:
                raise BadMeeting(f"there is no operation {other}")
        size = len(new) - len(there) if there is not None else _size(request.key, new)
        self._check_room(job, there is None, size)
        self._bytes += size
        job.values[request.key] = new
        return new

    def _check_room(self, job: _Job, is_new: bool, size: int) -> None:
        """NoRoom where the job may not have a key that is new, or so many bytes more."""
        if is_new and not job.values and len(self._jobs) >= MAX_JOBS:
            raise NoRoom(f"{MAX_JOBS} jobs meet here already: give this one's ranks their run's id")
        if is_new and len(job.values) >= MAX_KEYS:
            raise NoRoom(f"this job has {MAX_KEYS} keys already")
        if size > 0 and self._bytes + size > MAX_BYTES:
            raise NoRoom(f"the jobs that meet here have {MAX_BYTES} bytes already")

    def _forget(self, now: float) -> None:
        for name, job in list(self._jobs.items()):
            if now - job.used_at < FORGOTTEN_AFTER_S:
                return
            self._bytes -= sum(_size(key, value) for key, value in job.values.items())
            del self._jobs[name]


class Elsewhere:
    """The tables of the hub that everything is delivered to.

    dial: a new channel to it, or AgentError; metadata: what tells the hub who calls."""

    def __init__(
        self, dial: Callable[[], grpc.Channel], metadata: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._dial, self._metadata = dial, tuple(metadata)
        self._lock = threading.Lock()
        # The stub goes with the channel: to make one of a channel that is closed would end the process.
        self._hub: tuple[grpc.Channel, hub_pb2_grpc.HubStub] | None = None
        self._threads = ThreadPoolExecutor(4, "meet")
        self._asking = 0

    async def meet(self, request: agent_pb2.MeetRequest) -> agent_pb2.MeetResponse:
        """Has the hub take one step. BadMeeting, NoRoom, NoHub."""
        _check(request)
        if self._asking >= MAX_ASKING:
            raise NoHub(f"{self._asking} ranks wait for the hub already")
        self._asking += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._ask, request)
        finally:
            self._asking -= 1

    def close(self) -> None:
        """Waits for what is under way."""
        self._threads.shutdown(cancel_futures=True)
        if self._hub is not None:
            self._hub[0].close()

    def _ask(self, request: agent_pb2.MeetRequest) -> agent_pb2.MeetResponse:
        try:
            channel, hub = self._connected()
        except AgentError as error:
            raise NoHub(str(error)) from error
        try:
            response: agent_pb2.MeetResponse = hub.Meet(
                request, timeout=TIMEOUT_S, metadata=self._metadata
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                # It may be another one now, which must be made sure of.
                self._hang_up(channel)
            kind = _KINDS.get(error.code(), NoHub)
            raise kind(f"the hub says: {error.details() or error.code().name}") from None
        except ValueError:
            # gRPC's word where another thread has closed the channel since it was taken.
            self._hang_up(channel)
            raise NoHub("the connection to the hub has just been closed") from None
        return response

    def _connected(self) -> tuple[grpc.Channel, hub_pb2_grpc.HubStub]:
        with self._lock:
            if self._hub is None:
                channel = self._dial()
                self._hub = channel, hub_pb2_grpc.HubStub(channel)
            return self._hub

    def _hang_up(self, channel: grpc.Channel) -> None:
        with self._lock:
            if self._hub is not None and self._hub[0] is channel:
                self._hub = None
        channel.close()


_KINDS: dict[grpc.StatusCode, type[AgentError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: BadMeeting,
    grpc.StatusCode.RESOURCE_EXHAUSTED: NoRoom,
}


def _check(request: agent_pb2.MeetRequest) -> None:
    # An agent that serves a group puts the user before the job.
    for name, text, most in (("job", request.job, MAX_NAME + 20), ("key", request.key, MAX_NAME)):
        if not 0 < len(text) <= most:
            raise BadMeeting(f"the {name} has {len(text)} characters: give 1 to {MAX_NAME}")
    for name, value in (("value", request.value), ("expected", request.expected)):
        if len(value) > MAX_VALUE_BYTES:
            raise BadMeeting(f"{name} has {len(value)} bytes: give at most {MAX_VALUE_BYTES}")


def _sum(there: bytes | None, amount: int) -> bytes:
    try:
        # int() would take blanks and underscores, and texts of any length.
        number = int(there[:20]) if there else 0
        if there and str(number).encode() != there:
            raise ValueError
    except ValueError:
        raise BadMeeting("no number stands at this key: nothing can be added to it") from None
    if not -_MOST <= number + amount < _MOST:
        raise BadMeeting("the sum is too large")
    return str(number + amount).encode()


def _size(key: str, value: bytes) -> int:
    return _KEY_BYTES + len(key.encode()) + len(value)
