"""The service over a real socket, and a client of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from tests.agent.samples import losses, producer
from tests.fakes import DEADLINE_S
from trackagent.agent import server
from trackagent.agent.config import AgentConfig
from trackagent.agent.producers import to_message
from trackagent.agent.spool import Spool
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

Push = agent_pb2.PushRequest
ID = producer().producer_id
DATA = losses(range(4))
MAX_BATCH_BYTES = 1024 * 1024


@dataclass
class Served:
    """A running service and a client of it."""

    spool: Spool
    config: AgentConfig
    channel: grpc.Channel = field(init=False)
    stub: agent_pb2_grpc.AgentStub = field(init=False)

    def connect(self) -> None:
        self.channel = grpc.insecure_channel(
            f"unix:{self.config.socket_path}", [("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = agent_pb2_grpc.AgentStub(self.channel)

    def open(
        self, rank: int = 0, *, held: dict[int, int] | None = None, **changes: Any
    ) -> agent_pb2.OpenRunResponse:
        """OpenRun for this rank; `changes` to its identity."""
        message = to_message(producer(rank))
        for name, value in changes.items():
            setattr(message, name, value)
        return self.stub.OpenRun(
            agent_pb2.OpenRunRequest(
                protocol_version=server.PROTOCOL_VERSION,
                producer=message,
                held=offsets(held or {}),
            ),
            timeout=DEADLINE_S,
        )

    def push(self, *requests: Push) -> list[tuple[int, int]]:
        """One stream with these requests; the acknowledgements (lane, offset)."""
        responses = self.stub.Push(iter(requests), timeout=DEADLINE_S)
        return [(one.lane, one.offset) for one in responses]

    def close(self, ends: dict[int, int]) -> bool:
        request = agent_pb2.CloseRunRequest(producer_id=ID, ends=offsets(ends))
        return bool(self.stub.CloseRun(request, timeout=DEADLINE_S).complete)

    def status(self) -> agent_pb2.StatusResponse:
        return self.stub.Status(agent_pb2.StatusRequest(), timeout=DEADLINE_S)


def offsets(by_lane: dict[int, int]) -> list[agent_pb2.LaneOffset]:
    return [agent_pb2.LaneOffset(lane=lane, offset=offset) for lane, offset in by_lane.items()]


def push(data: bytes = DATA, first_offset: int = 0, lane: int = 0, rank: int = 0) -> Push:
    return Push(
        producer_id=producer(rank).producer_id,
        lane=lane,
        first_offset=first_offset,
        journal_bytes=data,
    )


Serve = Callable[..., Served]


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Code and message with which a call is refused."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


def spooled(served: Served) -> list[bytes]:
    delivery = served.spool.next_delivery("store", 1 << 30).result()
    return [batch.journal_bytes for batch in delivery.batches] if delivery else []


class Stream:
    """A Push stream under way."""

    def __init__(self, served: Served) -> None:
        self._requests: SimpleQueue[Push | None] = SimpleQueue()
        self.call = served.stub.Push(iter(self._requests.get, None))

    def send(self, request: Push) -> None:
        self._requests.put(request)

    def acknowledged(self) -> tuple[int, int]:
        """The next acknowledgement."""
        response = next(self.call)
        return response.lane, response.offset

    def end(self) -> None:
        self._requests.put(None)
