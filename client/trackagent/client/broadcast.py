"""Rank 0's word, which says the run and the attempt, and how it reaches the other ranks.

It travels through torch's own TCPStore (the one torchrun opens, or the one init_process_group
does), with no collective, no device, and before, after or without a process group; without torch
through a table of the agent's:

    trackagent/<call>/asks         counter; a rank adds 1 and so gets its number n
    trackagent/<call>/word         rank 0's word
    trackagent/<call>/answered     number; asks up to which some rank 0 has answered, by the word
    trackagent/<call>/run          run id of this call in this job, set once
    trackagent/attempt/<run id>    counter; attempts of that run in this job
    trackagent/began/<run id>      when this job first began that run, set once
    trackagent/taken/<token>       counter; ranks that hold this very word of rank 0

<call> counts the calls of decide() in one process, so that the second init() of every rank meets
the second of rank 0. torchrun's store outlives its workers; a restarted worker never takes an old
word, because it waits for the answer to an ask of its own, and only a living rank 0 answers.

A store may lose everything (an agent that is started again): a rank whose ask is gone asks again, and
rank 0 answers whoever asks.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol, TypeVar

from trackagent.client.errors import ConfigError, IdentityError
from trackagent.client.hub import Hub

GRACE_S = 30.0  # ranks of one job call init() within about this time of each other
EXIT_WAIT_S = 5.0
TELL_AFTER_S = 10.0  # a wait is worth a line in the log after this
ASK_POLL_S = (0.005, 0.25)  # first and longest pause
SERVE_POLL_S = (0.02, 1.0)
CONNECT_POLL_S = (0.05, 1.0)
INSIST_POLL_S = (0.05, 1.0)
POLL_GROWTH = 1.5
LOOK_AGAIN_S = 2.0  # how often a rank that waits makes sure that its ask is still there

T = TypeVar("T")

log = logging.getLogger("trackagent")


class Unclear(RuntimeError):
    """A call to a store was cut off: it may have been made, and may be made again."""


class Store(Protocol):
    """The part of torch.distributed.Store used here. Any call raises RuntimeError when the store is
    gone, or Unclear."""

    def add(self, key: str, amount: int, /) -> int: ...
    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class Link(Protocol):
    """A way to a store that all ranks of this job share."""

    name: str
    """For messages: what is being reached, and its address."""

    standing: bool
    """It is there already, for every rank alike: so rank 0 counts attempts in it. False: it opens
    later, with the job's process group."""

    def open(self) -> Store | None:
        """A connection of the caller's own, or None when there is nothing to connect to yet.
        Bounded."""

    def alive(self) -> bool:
        """False when a store that was there has gone, as far as can be seen without using it."""

    def close(self) -> None:
        """Gives up what open() made, from any thread: calls under way fail. Once more: nothing."""


Finder = Callable[[Mapping[str, str]], tuple[Link | None, tuple[int, int] | None, str]]
"""As find_link(), which says what the three are."""


@dataclass(frozen=True, slots=True)
class Word:
    """What rank 0 says. `token` tells this saying from any other. hub: None where the ranks' agents deliver
    wherever they do. job_time_ns: when its job first began the run, nanoseconds since 1970; 0: not known."""

    run_id: str
    attempt: int
    hub: Hub | None
    token: str
    job_time_ns: int = 0

    def encode(self) -> str:
        return json.dumps(asdict(self) | {"hub": self.hub.text() if self.hub else ""})

    @classmethod
    def decode(cls, data: bytes) -> Word:
        try:
            said = json.loads(data)
            return cls(
                normal_run_id(said["run_id"], "its run id"),
                int(said["attempt"]),
                Hub.parse(said["hub"]) if said["hub"] else None,
                str(said["token"]),
                int(said["job_time_ns"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            # Not the word itself: it may hold the hub's token.
            raise IdentityError(
                f"rank 0's word of {len(data)} bytes is not understood "
                f"({type(error).__name__}: {error}); "
                "install the same version of trackagent on every node"
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a rank may wait for another, and by which clock."""

    limit_s: float
    sleep: Callable[[float], object]
    clock: Callable[[], float]

    def at_most(self, limit_s: float) -> Patience:
        return replace(self, limit_s=min(self.limit_s, limit_s))

    def until(
        self, ready: Callable[[], T | None], what: str, poll_s: tuple[float, float]
    ) -> T | None:
        """What `ready` returns once that is not None, or None after `limit_s`. A long wait for
        `what` is told once; `poll_s` is the first pause between two looks and the longest."""
        begin = self.clock()
        pause, longest = poll_s
        told = False
        while (value := ready()) is None:
            waited = self.clock() - begin
            if waited >= self.limit_s:
                return None
            if not told and waited >= TELL_AFTER_S:
                told = True
                log.warning("waiting for %s; giving up in %.0f s", what, self.limit_s - waited)
            self.sleep(min(pause, self.limit_s - waited))
            pause = min(longest, pause * POLL_GROWTH)
        return value


def connect(link: Link, patience: Patience) -> Store | None:
    """A connection to the store, or None when it did not open in time."""
    return patience.until(link.open, link.name, CONNECT_POLL_S)


def claim(
    store: Store, call: int, given: str | None, new_id: Callable[[], str], patience: Patience
) -> str:
    """Rank 0's run id; without a given one, that of the same call in an earlier worker group goes
    on."""
    key = f"trackagent/{call}/run"
    if given is not None:
        _insist(lambda: store.set(key, given), patience)
        return given
    own = new_id()
    return _insist(lambda: store.compare_set(key, "", own), patience).decode()


def count(store: Store, run_id: str, earlier: int, patience: Patience) -> int:
    """Which attempt at the run this is in the store's count, after `earlier` ones that this process
    knows of but may have made before there was a store. A count that was cut off may leave a number out."""
    key = f"trackagent/attempt/{run_id}"
    number = _insist(lambda: store.add(key, 1), patience)
    if number > earlier:
        return number
    return _insist(lambda: store.add(key, earlier + 1 - number), patience)


def began(store: Store, run_id: str, now_ns: int, patience: Patience) -> int:
    """When this job first began the run: now, unless an earlier worker group did."""
    key = f"trackagent/began/{run_id}"
    return int(_insist(lambda: store.compare_set(key, "", str(now_ns)), patience))


def ask(store: Store, link: Link, call: int, who: str, patience: Patience) -> Word:
    """Rank 0's word, from the rank 0 that lives now. `who` asks, for the message of an
    IdentityError when no answer came in time."""
    prefix = f"trackagent/{call}"
    number = 0
    asked_at = -math.inf

    def answered() -> bytes | None:
        nonlocal number, asked_at
        try:
            if patience.clock() - asked_at >= LOOK_AGAIN_S:
                # Also at the first look. An ask that was cut off is no more than one too many.
                if not number or store.add(f"{prefix}/asks", 0) < number:
                    number = store.add(f"{prefix}/asks", 1)
                asked_at = patience.clock()
            if store.add(f"{prefix}/answered", 0) >= number:
                return store.get(f"{prefix}/word")
        except Unclear:
            pass
        return None

    # Not store.wait(): it cannot be interrupted by Ctrl-C, and every time-out in it writes to
    # stderr.
    said = patience.until(answered, "client.init() on rank 0", ASK_POLL_S)
    if said is None:
        raise IdentityError(
            f"{who} waited {patience.limit_s:g} s for rank 0's word through {link.name}: rank 0 "
            f"has not made its client.init() call number {call}, or has finished that run already; "
            "call client.init() on every rank, equally often, or raise "
            "TRACKAGENT_IDENTITY_TIMEOUT_S"
        )
    word = Word.decode(said)
    # Where that is cut off, rank 0 serves for longer than it need.
    with contextlib.suppress(Unclear):
        store.add(f"trackagent/taken/{word.token}", 1)
    return word


def _insist(step: Callable[[], T], patience: Patience) -> T:
    """What the step returns, which is made again while it is cut off."""
    problem = ""

    def made() -> tuple[T] | None:
        nonlocal problem
        try:
            return (step(),)
        except Unclear as error:
            problem = str(error)
            return None

    done = patience.until(made, "the store in which the ranks agree", INSIST_POLL_S)
    if done is None:
        raise RuntimeError(problem)
    return done[0]


class Server:
    """Rank 0's thread: answers asks until every other rank holds the word, stop(), or the store is
    gone.

    The thread alone touches the store once start() was called. A forked child has no such thread,
    and stop() does nothing there.
    """

    def __init__(
        self,
        store: Store | None,
        link: Link,
        word: Word,
        call: int,
        others: int,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._link = link
        self._word = word
        self._call = call
        self._others = others
        self._clock = clock
        self._began = clock()
        self._pid = os.getpid()
        self._wake = threading.Event()
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="trackagent-identity", daemon=True)

    def start(self) -> None:
        self._thread.start()
        # A daemon thread that comes back from C++ into an interpreter that is being torn down would
        # abort it.
        atexit.register(self.stop, EXIT_WAIT_S)

    def stop(self, wait_s: float) -> None:
        """Waits up to `wait_s`, and never beyond GRACE_S from its construction, for ranks that have
        no answer yet."""
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.stop)
        linger = 0.0
        if self._store is not None:
            linger = max(0.0, min(wait_s, self._began + GRACE_S - self._clock()))
        self._stop_at = self._clock() + linger
        self._wake.set()
        self._thread.join(linger + 0.5)
        self._link.close()
        self._thread.join(0.5)

    def _run(self) -> None:
        try:
            if self._store is None:
                self._store = self._opened()
            if self._store is not None:
                self._serve(self._store)
        except RuntimeError:
            pass  # The store went with the job's process group or its host: nobody is left to ask.
        finally:
            self._store = None
            self._link.close()

    def _opened(self) -> Store | None:
        pause, longest = CONNECT_POLL_S
        while (store := self._link.open()) is None:
            if self._stops_within(pause):
                return None
            pause = min(longest, pause * POLL_GROWTH)
        return store

    def _serve(self, store: Store) -> None:
        shortest, longest = SERVE_POLL_S
        pause = shortest
        # The store may go with destroy_process_group(); torch prints a stack when it is used after.
        while self._link.alive():
            with contextlib.suppress(Unclear):
                if self._answered(store):
                    pause = shortest
                taken = f"trackagent/taken/{self._word.token}"
                if not self._link.alive() or store.add(taken, 0) >= self._others:
                    return
            if self._stops_within(shortest if self._stop_at is not None else pause):
                return
            pause = min(longest, pause * POLL_GROWTH)

    def _answered(self, store: Store) -> bool:
        """Answers who has asked; whether there was anybody."""
        prefix = f"trackagent/{self._call}"
        asks = store.add(f"{prefix}/asks", 0)
        if asks <= store.add(f"{prefix}/answered", 0):
            return False
        store.set(f"{prefix}/word", self._word.encode())
        store.set(f"{prefix}/answered", str(asks))
        return True

    def _stops_within(self, pause: float) -> bool:
        """Waits `pause` seconds, less when stop() is called; then says whether its time came."""
        if self._wake.wait(pause) and self._stop_at is not None:
            if self._clock() >= self._stop_at:
                return True
            time.sleep(min(pause, SERVE_POLL_S[0]))
        return False


def normal_run_id(text: str, origin: str) -> str:
    """`text` as 32 lowercase hex digits; ConfigError, naming `origin`, when it is no run id."""
    plain = str(text).strip().lower().replace("-", "")
    if not re.fullmatch(r"[0-9a-f]{32}", plain):
        raise ConfigError(f"{origin} is {text!r}: give 32 hex digits (a UUID, dashes are allowed)")
    return plain
