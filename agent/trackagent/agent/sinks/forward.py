"""The sink that forwards to a hub: each delivery is one part, and those of other agents go with it unread.

A part is sent under the range of the spool that it was made of, so the hub keeps it once however often it is
sent. The connection is made anew after each failure, and the hub made sure of then.

A hub that takes runs by their tokens refuses a part when it lacks the token of one of them. What several runs
logged is rejected then, for the pipeline to take it apart; what one did is kept, since rank 0 may not have
connected to the hub yet, and rejected when that takes too long: it becomes dead letters, and others flow on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from trackagent.agent import tls
from trackagent.agent.addresses import hub_address, joined
from trackagent.agent.errors import AgentError
from trackagent.agent.sinks.contract import Away, says_something
from trackagent.agent.store.contract import Batch, BatchId, Rejected, node_run_id
from trackagent.agent.wire import encode
from trackagent.protos.v1 import hub_pb2, hub_pb2_grpc

if TYPE_CHECKING:
    from trackagent.agent.config import AgentConfig
    from trackagent.agent.store.contract import ProducerInfo

UPSTREAM_SINK = "upstream"
PROTOCOL_VERSION = 1
# Of one call; the hub allows no more.
MAX_PARTS = 64
MAX_PARTS_BYTES = 16 * 1024 * 1024
CALL_TIMEOUT_S = 20.0
# Longer than that no hub makes an agent wait.
MAX_GATHER_S = 30.0
# How long a run that its hub does not know holds up what is behind it.
UNKNOWN_S = 300.0
# Runs that a hub did not know are remembered, so many; beyond it the first go, and hold things up again.
MAX_UNKNOWN = 1000

Grants = Callable[[Iterable[str]], Mapping[str, str]]
"""The tokens of these runs; of some that the hub may take, where there are none."""


class HubRefused(AgentError):
    """A hub did not take what it was sent; it may, later."""


class _NoRight(HubRefused):
    """It does not know by what this agent could deliver that."""


class ForwardSink:
    """Delivers to the hub that `connect` gives a channel to, with where it is, for messages; what that raises
    keeps the delivery. grants: the tokens of runs, which go with what is said of them, None where the hub
    takes any run from this agent; headers: of every call. node: this one's name, for people.
    unknown_s: how long a run is kept that the hub does not know, by `clock`, as time.monotonic."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], tuple[str, grpc.Channel]],
        *,
        grants: Grants | None = None,
        headers: Sequence[tuple[str, str]] = (),
        node: str,
        unknown_s: float = UNKNOWN_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._connect = connect
        self._grants = grants
        self._headers = tuple(headers)
        self._node = node
        self._unknown_s, self._clock = unknown_s, clock
        # Since when, by run.
        self._unknown: dict[str, float] = {}
        self.gather_s = 0.0
        self._address = ""
        self._channel: grpc.Channel | None = None

    def deliver(self, batch: Batch) -> None:
        own = replace(batch, parts=())
        mine = [_part(batch.id, encode(own))] if says_something(own) else []
        runs = _runs_of(batch.producers)
        for some in _together(hub_pb2.Part.FromString(part) for _, part in batch.parts):
            self._forward(some, runs)
        # When all of that has arrived: a hub that knows this range counts as having the whole batch.
        if mine:
            try:
                self._forward(mine, runs)
            except _NoRight as error:
                if self._grants is not None:
                    self._check_patience(runs, error)
                raise
            for run_id in runs:
                self._unknown.pop(run_id, None)

    def last_accepted(self, origin: str) -> int:
        grants = self._granted(())
        request = hub_pb2.KnownRequest(
            protocol_version=PROTOCOL_VERSION, grants=grants, origin=origin
        )
        return self._call(lambda hub: int(hub.Known(request, **self._terms()).last))

    def idle(self, deadline_s: float) -> bool:
        return False

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _forward(self, parts: Sequence[hub_pb2.Part], runs: Iterable[str]) -> None:
        request = hub_pb2.ForwardRequest(
            protocol_version=PROTOCOL_VERSION,
            node=self._node,
            grants=self._granted(runs),
            parts=parts,
        )
        gather_ms = self._call(lambda hub: int(hub.Forward(request, **self._terms()).gather_ms))
        self.gather_s = min(gather_ms / 1000, MAX_GATHER_S)

    def _check_patience(self, runs: Collection[str], error: _NoRight) -> None:
        """Rejected where others are not to wait for what the hub has refused."""
        if len(runs) > 1:
            raise Rejected(f"{error}; what {len(runs)} runs logged goes there one by one")
        for run_id in runs:
            since = self._unknown.setdefault(run_id, self._clock())
            if len(self._unknown) > MAX_UNKNOWN:
                del self._unknown[next(iter(self._unknown))]
            if self._clock() - since > self._unknown_s:
                raise Rejected(
                    f"{error}; it has been so for {self._unknown_s:.0f} s, and others wait: once rank 0 of "
                    "the run has connected to the hub's agent, deliver this dead letter again"
                )

    def _granted(self, runs: Iterable[str]) -> list[hub_pb2.Grant]:
        if self._grants is None:
            return []
        return [
            hub_pb2.Grant(run_id=run_id, token=token)
            for run_id, token in self._grants(runs).items()
        ]

    def _terms(self) -> dict[str, object]:
        return {"timeout": CALL_TIMEOUT_S, "metadata": self._headers}

    def _call(self, call: Callable[[hub_pb2_grpc.HubStub], int]) -> int:
        if self._channel is None:
            self._address, self._channel = self._connect()
        try:
            return call(hub_pb2_grpc.HubStub(self._channel))
        except grpc.RpcError as error:
            self.close()
            what = error.details() or error.code().name
            if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
                raise Rejected(f"the hub at {self._address} says: {what}") from None
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Away(f"the hub at {self._address} does not answer ({what})") from None
            rights = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
            kind = _NoRight if error.code() in rights else HubRefused
            raise kind(f"the hub at {self._address}: {what}") from None


def upstream_sink(config: AgentConfig, node: str) -> ForwardSink:
    """The sink of an agent that delivers everything to the hub `config.store`. AgentError when what makes it
    known there cannot be read."""
    address = joined(*hub_address(config.store))
    return ForwardSink(
        UPSTREAM_SINK,
        lambda: (address, tls.store_channel(config)),
        headers=tls.bearer(config),
        node=node,
    )


def _part(id_: BatchId, content: bytes) -> hub_pb2.Part:
    if len(content) > MAX_PARTS_BYTES:
        raise Rejected(f"{len(content)} bytes at once are more than a hub takes, {MAX_PARTS_BYTES}")
    return hub_pb2.Part(origin=id_.origin, first=id_.first, last=id_.last, content=content)


def _runs_of(infos: Iterable[ProducerInfo]) -> set[str]:
    """Without those that only stand for nodes."""
    return {info.run_id for info in infos if info.run_id != node_run_id(info.node)}


def _together(parts: Iterable[hub_pb2.Part]) -> Iterator[list[hub_pb2.Part]]:
    """As many as one call may have."""
    some: list[hub_pb2.Part] = []
    size = 0
    for part in parts:
        if some and (len(some) == MAX_PARTS or size + len(part.content) > MAX_PARTS_BYTES):
            yield some
            some, size = [], 0
        some.append(part)
        size += len(part.content)
    if some:
        yield some
