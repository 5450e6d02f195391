"""The sink that forwards to a hub: each delivery is one part, and those of other agents go with it unread.

A part is sent under the range of the spool that it was made of, so the hub keeps it once however often it is
sent. The connection is made anew after each failure, and the hub made sure of then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc

from trackagent.agent.errors import AgentError
from trackagent.agent.sinks.contract import Away, says_something
from trackagent.agent.store.contract import Batch, BatchId, Rejected, node_run_id
from trackagent.agent.wire import encode
from trackagent.protos.v1 import hub_pb2, hub_pb2_grpc

if TYPE_CHECKING:
    from trackagent.agent.store.contract import ProducerInfo

PROTOCOL_VERSION = 1
# Of one call; the hub allows no more.
MAX_PARTS = 64
MAX_PARTS_BYTES = 16 * 1024 * 1024
CALL_TIMEOUT_S = 20.0
# Longer than that no hub makes an agent wait.
MAX_GATHER_S = 30.0

Grants = Callable[[Iterable[str]], Mapping[str, str]]
"""The tokens of these runs; of any run that the hub takes, where there are none."""


class HubRefused(AgentError):
    """A hub did not take what it was sent; it may, later."""


class ForwardSink:
    """Delivers to the hub that `connect` gives a channel to, with where it is, for messages; what that raises
    keeps the delivery. grants: the tokens of runs, which go with what is said of them; authorization: for all
    runs, in every call's header. node: this one's name, for people."""

    def __init__(
        self,
        name: str,
        connect: Callable[[], tuple[str, grpc.Channel]],
        *,
        grants: Grants,
        authorization: str = "",
        node: str,
    ) -> None:
        self.name = name
        self._connect = connect
        self._grants = grants
        self._metadata = (("authorization", authorization),) if authorization else ()
        self._node = node
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
            self._forward(mine, runs)

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

    def _granted(self, runs: Iterable[str]) -> list[hub_pb2.Grant]:
        return [
            hub_pb2.Grant(run_id=run_id, token=token)
            for run_id, token in self._grants(runs).items()
        ]

    def _terms(self) -> dict[str, object]:
        return {"timeout": CALL_TIMEOUT_S, "metadata": self._metadata}

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
            raise HubRefused(f"the hub at {self._address}: {what}") from None


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
