"""An agent's part of forwarding, and a hub that takes what it sends: what tests of the way share."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from tests.agent.samples import losses, metrics, producer
from tests.agent.sinks import FakeSink
from tests.fakes import DEADLINE_S
from trackagent.agent.collect.recorder import EXPERIMENT
from trackagent.agent.deadletters import DeadLetters
from trackagent.agent.forwarding import Forwarding
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.routes import Routes
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import BatchId, ProducerInfo, node_run_id
from trackagent.client.hub import Hub
from trackagent.protos.v1 import hub_pb2, hub_pb2_grpc

NODE = "host-a"
PIN, TOKEN = "1" * 64, "c" * 32


class HubServer(hub_pb2_grpc.HubServicer):
    """A hub without TLS: takes parts into a spool of its own, and from there into a sink. answers: what the
    next calls end with instead; forgets: whether it then has taken what it does not answer."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._begin()
        self.answers: list[grpc.StatusCode] = []
        self.gather_ms = 0
        self.takes_unanswered = False
        # Calls wait while it is not set.
        self.hold, self.held = threading.Event(), threading.Event()
        self.hold.set()
        self.requests: list[hub_pb2.ForwardRequest] = []
        self.port = 0
        self._server: grpc.Server | None = None
        self.start()

    def _begin(self) -> None:
        folder = self._folder
        folder.mkdir()
        self._spool = Spool(folder / "spool.db", max_bytes=1 << 30, linger_s=0.0)
        self.sink = FakeSink("hub")
        self._pipeline = Pipeline(
            self._spool,
            self.sink,
            interval_s=0.01,
            dead_letters=DeadLetters(folder / "letters", "hub", max_bytes=1 << 30),
        )
        self._pipeline.start()

    def arrived(self, origin: str) -> list[tuple[int, int]]:
        return self._spool.arrived(origin).result()

    def lose_everything(self) -> None:
        """Its folder is gone, and another one begun."""
        self.close()
        shutil.rmtree(self._folder)
        self._begin()
        self.start()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        hub_pb2_grpc.add_HubServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()

    def close(self) -> None:
        self.stop()
        self._pipeline.stop(DEADLINE_S)
        self._spool.close()

    def Forward(self, request: hub_pb2.ForwardRequest, context: Any) -> hub_pb2.ForwardResponse:
        if not self.hold.is_set():
            self.held.set()
            self.hold.wait(DEADLINE_S)
        answer = self.answers.pop(0) if self.answers else None
        if answer is None or self.takes_unanswered:
            for part in request.parts:
                id_ = BatchId(part.origin, part.first, part.last)
                self._spool.accept(id_, part.SerializeToString(), request.node).result()
        if answer is not None:
            context.abort(answer, "not now")
        self.requests.append(request)
        return hub_pb2.ForwardResponse(gather_ms=self.gather_ms)

    def Known(self, request: hub_pb2.KnownRequest, context: Any) -> hub_pb2.KnownResponse:
        ranges = self.arrived(request.origin)
        return hub_pb2.KnownResponse(last=ranges[-1][1] if ranges else 0)

    @property
    def steps(self) -> list[int]:
        return self.sink.steps


class Leaf:
    """An agent's part of forwarding, on a spool and routes of its own."""

    def __init__(self, spool: Spool, folder: Path, hub: HubServer, **options: Any) -> None:
        self.spool, self.hub = spool, hub
        self.letters = folder / "letters"
        self.routes = Routes(folder / "routes.db", folder / "quarantine")
        spool.add_sink("store").result()
        self.reached = threading.Event()
        self.forwarding = Forwarding(
            spool,
            self.routes,
            node=NODE,
            interval_s=0.01,
            dead_letters=lambda sink: DeadLetters(self.letters, sink, max_bytes=1 << 30),
            connect=self._connect,
            **options,
        )

    def _connect(self, address: str, pin: str) -> grpc.Channel:
        assert pin == PIN
        self.reached.set()
        return grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])

    def open(self, rank: int = 0, **changes: Any) -> ProducerInfo:
        """A rank whose rank 0 named the hub."""
        named = Hub(f"127.0.0.1:{self.hub.port}", PIN, TOKEN)
        info = producer(rank, **changes)
        info = producer(rank, **{**changes, "hub": self.forwarding.route(info.run_id, named)})
        self.spool.open_producer(info, {}).result()
        return info

    def log(self, info: ProducerInfo, *steps: int) -> None:
        data = losses(range(0)) + b"".join(metrics(0, step, 0.0, 0.0) for step in steps)
        at = self.spool.committed(info.producer_id).result().get(0, 0)
        self.spool.append(info.producer_id, 0, at, data).result()

    def origin(self, pipeline: Pipeline) -> str:
        """Under which it forwards."""
        return self.spool.add_sink(pipeline.sink_name, apart=True).result()

    def close(self) -> None:
        self.forwarding.stop(0.0)
        self.routes.close()


def node_samples(number: int = 9) -> ProducerInfo:
    """What is sampled of the leaf's node."""
    run_id = node_run_id(NODE)
    return producer(number, run_id=run_id, sampled=f"node {NODE}", experiment=EXPERIMENT, node=NODE)
