"""Which way records go: to this node's store, to the hub that rank 0 named, or all to one hub.

A producer has one way for ever, decided when it is opened and kept with it in the spool. A hub's sink is in
the spool before the first byte for it, and goes when nobody here delivers to it any more.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

import grpc

from trackagent.agent.collect.recorder import EXPERIMENT
from trackagent.agent.deadletters import DeadLetters
from trackagent.agent.errors import AgentError
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.reducing import Reducer
from trackagent.agent.routes import Routes
from trackagent.agent.sinks.forward import ForwardSink, HubRefused
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import ProducerInfo, node_run_id
from trackagent.client.hub import Hub

logger = logging.getLogger(__name__)

HUB_SINK = "hub-"
PIN_CHARACTERS = 16
# A hub that is back is found within about this time.
HUB_BACKOFF_S = 5.0
# How long a hub's sink stays when nobody delivers to it.
IDLE_S = 60.0
SWEEP_INTERVAL_S = 10.0


class Guests(Protocol):
    """The runs that other nodes may deliver to here."""

    def note(self, run_id: str, token: str) -> None: ...


class Forwarding:
    """Decides the way of each producer, and feeds a sink for each hub.

    pin: this agent's own, where others can reach it; guests: notes the tokens of runs whose hub it is.
    elsewhere: all goes to one hub, whatever rank 0 names. connect: a channel to the hub with a
    pin at an address. reducer, dead_letters, interval_s: as for each Pipeline. clock: as time.monotonic. Any
    thread may call."""

    def __init__(
        self,
        spool: Spool,
        routes: Routes,
        *,
        node: str,
        interval_s: float,
        dead_letters: Callable[[str], DeadLetters],
        connect: Callable[[str, str], grpc.Channel],
        pin: str = "",
        guests: Guests | None = None,
        elsewhere: bool = False,
        reducer: Reducer | None = None,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spool = spool
        self._routes = routes
        self._node = node
        self._interval_s = interval_s
        self._dead_letters = dead_letters
        self._connect = connect
        self._pin = pin
        self._guests = guests
        self._elsewhere = elsewhere
        self._reducer = reducer
        self._idle_s = idle_s
        self._clock = clock
        # Held to begin a hub's sink or to end one, and never while a hub is waited for.
        self._lock = threading.Lock()
        # Replaced and never changed: who asks does not wait.
        self._pipelines: Mapping[str, Pipeline] = {}
        self._used: dict[str, float] = {}
        self._stopping = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep_often, name="routes", daemon=True)

    def start(self) -> None:
        """Goes on with what an earlier agent here had to forward."""
        with self._lock:
            known = set(self._spool.sinks().result())
            for pin in self._routes.pins():
                if _sink_name(pin) in known:
                    self._begin_hub(pin)
        self._sweeper.start()

    def stop(self, timeout_s: float) -> None:
        """Delivers what is spooled, to all hubs together for at most about timeout_s."""
        self._stopping.set()
        with self._lock:  # from here on no sink is begun
            pipelines = self.pipelines()
        stopping = [
            threading.Thread(target=pipeline.stop, args=(timeout_s,), name="stop")
            for pipeline in pipelines
        ]
        for thread in stopping:
            thread.start()
        for thread in [*stopping, self._sweeper]:
            thread.join()

    def route(self, run_id: str, hub: Hub) -> str:
        """The way of a producer that is opened now, whose rank 0 named this hub: its pin, or "" for wherever
        this agent delivers to. Waits for the disk. sqlite3.Error or SpoolError: nothing is decided."""
        if hub.pin == self._pin:
            if self._guests is not None:
                self._guests.note(run_id, hub.token)
            return ""
        if self._elsewhere:
            return ""
        self._routes.note(run_id, hub)
        with self._lock:
            self._used[hub.pin] = self._clock()
            self._feed(hub.pin)
        return hub.pin

    def pipelines(self) -> list[Pipeline]:
        """Those of the hubs."""
        return list(self._pipelines.values())

    def _feed(self, pin: str) -> None:
        """Begins the hub's sink, unless it is there and fed."""
        fed = self._pipelines.get(pin)
        if fed is None or not fed.is_alive():
            self._begin_hub(pin)

    def _begin_hub(self, pin: str) -> None:
        sink = ForwardSink(
            _sink_name(pin),
            partial(self._reach, pin),
            grants=partial(self._grants, pin),
            node=self._node,
            clock=self._clock,
        )
        pipeline = Pipeline(
            self._spool,
            sink,
            interval_s=self._interval_s,
            dead_letters=self._dead_letters(sink.name),
            wanted=partial(self._goes_to, pin),
            reducer=self._reducer,
            opens=False,
            from_now=True,
            max_backoff_s=HUB_BACKOFF_S,
        )
        self._used.setdefault(pin, self._clock())
        pipeline.start()
        self._pipelines = {**self._pipelines, pin: pipeline}

    def _goes_to(self, pin: str, info: ProducerInfo) -> bool:
        """What is sampled of the node goes to every hub that has runs here, or had a moment ago; what other
        agents forward goes to none of these, whatever they say their node is."""
        if info.experiment == EXPERIMENT and info.run_id == node_run_id(self._node):
            return bool(info.sampled) and not self._is_idle(pin)
        return info.hub == pin

    def _is_idle(self, pin: str) -> bool:
        return self._clock() - self._used[pin] > self._idle_s

    def _reach(self, pin: str) -> tuple[str, grpc.Channel]:
        address = self._routes.address(pin)
        if address is None:
            raise HubRefused(
                f"nobody has said where the hub {pin[:PIN_CHARACTERS]} is: its runs' next ranks will"
            )
        return address, self._connect(address, pin)

    def _grants(self, pin: str, runs: Iterable[str]) -> Mapping[str, str]:
        return self._routes.tokens(pin, runs) or self._routes.newest(pin)

    def _sweep_often(self) -> None:
        while not self._stopping.wait(min(SWEEP_INTERVAL_S, self._idle_s)):
            try:
                self._sweep()
            except (AgentError, OSError, sqlite3.Error) as error:
                logger.warning("cannot look which hubs are needed: %s; trying again", error)

    def _sweep(self) -> None:
        """Ends the sinks of hubs that nobody here delivers to any more, and that have everything but samples:
        a hub that ends with its job does not wait for those, and may never come back for them."""
        here = {info.hub for info in self._spool.not_ended().result() if not info.sampled}
        for pin, pipeline in self._pipelines.items():
            if pin in here:
                self._used[pin] = self._clock()
            if self._is_idle(pin) and not pipeline.dead_letters()[0] and self._has_all(pin):
                self._let_go(pin, pipeline)
            else:
                self._go_on(pin)

    def _let_go(self, pin: str, pipeline: Pipeline) -> None:
        """The sink is fed again where that is not done in the end: somebody came, or the spool failed."""
        logger.info("nobody here delivers to the hub %s any more", pin[:PIN_CHARACTERS])
        pipeline.stop(0.0)  # as long as a call may take
        with self._lock:
            if self._is_idle(pin) and self._has_all(pin):
                self._spool.remove_sink(pipeline.sink_name).result()
                self._pipelines = {one: fed for one, fed in self._pipelines.items() if one != pin}
                del self._used[pin]
                return
        self._go_on(pin)

    def _go_on(self, pin: str) -> None:
        with self._lock:
            if not self._stopping.is_set():
                self._feed(pin)

    def _has_all(self, pin: str) -> bool:
        awaited = self._spool.awaited(_sink_name(pin)).result()
        return not any(info.hub == pin and not info.sampled for info in awaited)


def _sink_name(pin: str) -> str:
    return f"{HUB_SINK}{pin[:PIN_CHARACTERS]}"
