"""A proxy between ranks and agent that does to messages what networks and retries do.

It speaks the protocol itself: OpenRun, Push and CloseRun of the ranks go on to the agent, each Push stream
over a stream of its own. In between it delays, doubles, swaps and replays batches, keeps acknowledgements
back, and breaks connections.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc

from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

THREADS = 64
REMEMBERED = 50  # batches of each producer, over all of its connections


class Proxy(agent_pb2_grpc.AgentServicer):
    """Listens at `socket`, forwards to the agent at `agent`. What it does may be changed at any time."""

    def __init__(self, socket: Path, agent: str, seed: int) -> None:
        self.delay_s = 0.0
        self.doubles = False
        self.replays = False
        self.swaps = False
        self.drops_acknowledgements = False
        self.counts: dict[str, int] = defaultdict(int)
        self._socket = socket
        self._agent = agent
        self._chance = random.Random(seed)
        self._sent: dict[bytes, deque[agent_pb2.PushRequest]] = defaultdict(
            lambda: deque(maxlen=REMEMBERED)
        )
        self._server: grpc.Server | None = None

    @property
    def address(self) -> str:
        return f"unix:{self._socket}"

    def start(self) -> None:
        """Listens, again if need be."""
        self._socket.unlink(missing_ok=True)
        server = grpc.server(futures.ThreadPoolExecutor(THREADS))
        agent_pb2_grpc.add_AgentServicer_to_server(self, server)
        server.add_insecure_port(self.address)
        server.start()
        self._server = server

    def cut(self) -> None:
        """Breaks every connection, whatever is under way on it, and takes no more until `start`."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(None).wait()

    # --- the protocol

    def OpenRun(
        self, request: agent_pb2.OpenRunRequest, context: grpc.ServicerContext
    ) -> agent_pb2.OpenRunResponse:
        return self._forward("OpenRun", request, context)

    def CloseRun(
        self, request: agent_pb2.CloseRunRequest, context: grpc.ServicerContext
    ) -> agent_pb2.CloseRunResponse:
        return self._forward("CloseRun", request, context)

    def _forward(self, call: str, request: object, context: grpc.ServicerContext) -> object:
        time.sleep(self.delay_s)
        with self._channel() as channel:
            forward = getattr(agent_pb2_grpc.AgentStub(channel), call)
            try:
                answer = forward(request, timeout=10.0)
                if self.doubles:
                    self.counts["doubled"] += 1
                    answer = forward(request, timeout=10.0)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            if self.drops_acknowledgements:
                # It has happened, and who asked never hears of it.
                self.counts["dropped"] += 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "dropped by the proxy")
            return answer

    def Push(
        self, requests: Iterator[agent_pb2.PushRequest], context: grpc.ServicerContext
    ) -> Iterator[agent_pb2.PushResponse]:
        with self._channel() as channel:
            answers = agent_pb2_grpc.AgentStub(channel).Push(self._disturbed(requests))
            context.add_callback(answers.cancel)
            try:
                for answer in answers:
                    if self.drops_acknowledgements:
                        self.counts["dropped"] += 1
                        continue
                    time.sleep(self.delay_s)
                    yield answer
            except grpc.RpcError as error:
                if context.is_active():
                    context.abort(error.code(), error.details() or "")

    def _disturbed(
        self, requests: Iterator[agent_pb2.PushRequest]
    ) -> Iterator[agent_pb2.PushRequest]:
        held: agent_pb2.PushRequest | None = None
        try:
            for request in requests:
                sent = self._sent[request.producer_id]
                time.sleep(self.delay_s)
                if self.replays and sent:
                    self.counts["replayed"] += 1
                    yield self._chance.choice(list(sent))
                if self.swaps and held is None and self._chance.random() < 0.3:
                    held = request  # until after the one that follows it
                    continue
                yield request
                sent.append(request)
                if self.doubles:
                    self.counts["doubled"] += 1
                    yield request
                if held is not None:
                    self.counts["swapped"] += 1
                    yield held
                    held = None
        except grpc.RpcError:
            pass  # the rank's side has broken: so does the agent's

    def _channel(self) -> grpc.Channel:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        return grpc.insecure_channel(self._agent, options)
