"""Who this process is: its run, attempt and rank, the same run and attempt on every rank of a job.

Rank 0 decides and its word counts; broadcast.py is how the word travels.

Promised: all ranks that return agree, or IdentityError after a bounded wait. Not promised:
agreement when ranks call init() unequally often, or when run ids are given to some ranks only and
there is no store to compare them in.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol
from uuid import uuid4

from trackagent.client.broadcast import (
    EXIT_WAIT_S,
    Finder,
    Link,
    Patience,
    Server,
    Store,
    Word,
    ask,
    began,
    claim,
    connect,
    count,
    normal_run_id,
)
from trackagent.client.errors import IdentityError
from trackagent.client.history import THIS_PROCESS, History
from trackagent.client.hub import Hub
from trackagent.client.ranks import Ranks, ranks_here, whole_number
from trackagent.client.torchlink import find_link

MAX_NODE_CHARACTERS = 253  # a DNS name's limit, and Kubernetes'
SPARE_CONNECT_S = 5.0  # where the store is of use but not needed

RUN_ID_VARIABLES = ("TRACKAGENT_RUN_ID", "MLFLOW_RUN_ID")
REMEDY = (
    "start the ranks with torchrun, or call client.init() after "
    "torch.distributed.init_process_group(), or set TRACKAGENT_RUN_ID to the same 32 hex digits "
    "for every rank"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One rank of one attempt of one run, and where it is."""

    run_id: str
    """32 lowercase hex digits, as in MLflow."""

    attempt: int
    """1, 2, …: the how-manieth start of this run, in rank 0's count."""

    rank: int
    local_rank: int
    world_size: int

    node: str
    """The host's name (in Kubernetes the node's, where NODE_NAME gives it), or TRACKAGENT_NODE."""

    hub: Hub | None = None
    """The run's hub, as rank 0 said; None: its agent delivers wherever it does."""

    job_time_ns: int = 0
    """When rank 0's job first began this run, nanoseconds since 1970; orders the jobs that continue a run and
    each count from 1. 0: not known."""


class Hubs(Protocol):
    """Which hub a run has, as far as this process can say by itself. Bounded; ConfigError names an unusable
    variable."""

    def name(self, ranks: Ranks, /) -> tuple[Hub | None, str]:
        """The hub that rank 0 names, and a sentence for the user, or ""."""

    def unheard(self, ranks: Ranks, /) -> str:
        """A sentence for the user where this rank should hear of rank 0's hub, or tell of it, and cannot; or
        ""."""

    def of(self, run_id: str, /) -> Hub | None:
        """The hub of a run that another process here takes part in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What decide() found. `warnings` are sentences for the user, to be shown once."""

    identity: Identity
    warnings: tuple[str, ...] = ()
    _server: Server | None = None

    def stop_serving(self, wait_s: float = EXIT_WAIT_S) -> None:
        """Ends rank 0's answers; nothing on other ranks, in a forked child, or the second time.

        Returns at once when every other rank has its answer, or when decide() was longer than
        GRACE_S ago. Otherwise (a short script) waits up to `wait_s`, and never beyond GRACE_S, for
        the ranks to come.
        """
        if self._server is not None:
            self._server.stop(wait_s)


def decide(
    *,
    run_id: str | None,
    timeout_s: float,
    hubs: Hubs | None = None,
    environ: MutableMapping[str, str] = os.environ,
    history: History = THIS_PROCESS,
    find: Finder | None = None,
    meet: Callable[[Ranks, Mapping[str, str]], tuple[Link | None, str]] | None = None,
    hostname: Callable[[], str] = socket.gethostname,
    new_id: Callable[[], str] = lambda: uuid4().hex,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    now_ns: Callable[[], int] = time.time_ns,
) -> Decision:
    """The identity of this process in the next run of its job; to be called once for each init(),
    by the main process of a rank, on every rank equally often.

    hubs: which hub rank 0 names; None: it names none. meet: where ranks without torch meet, and without such
    a place, why; asked where they need one. Notes in `environ` what processes that this one starts
    need to know. Returns within about twice
    `timeout_s`. On rank 0 of a job it leaves a daemon thread that gives its word to the others. ConfigError
    names an unusable argument or variable; IdentityError says what was waited for. A call that raises does
    not count: the next one takes its place.
    """
    given, origin = given_run_id(run_id, environ)
    first_attempt = whole_number(
        "TRACKAGENT_ATTEMPT", environ.get("TRACKAGENT_ATTEMPT") or "1", least=1
    )
    link, group, obstacle = (find or find_link)(environ)
    ranks = ranks_here(group, environ)
    told = ranks
    if history.ranks is None and group is None:
        history.inherit(ranks, environ)
    belongs = history.belongs_to(ranks)
    if belongs:
        # The rank that made it speaks with the others. This one has a run of its own, or is one more
        # process of the run that it was given.
        link = None
        ranks = ranks if given else Ranks(rank=0, local_rank=0, world_size=1)
    # Through torch's store alone does rank 0 say a hub: where ranks meet at one, it is their agents' already.
    hub, problem = _hub(hubs, ranks, link, given, belongs=belongs)
    if link is None and not given and ranks.world_size > 1 and meet is not None:
        link, why = meet(ranks, environ)
        obstacle = f"{obstacle}; {why}"
    caller = _Caller(
        ranks=ranks,
        call=history.calls + 1,
        given=given,
        first_attempt=first_attempt,
        hub=hub,
        hubs=hubs,
        earlier=history.attempts,
        job_time_ns=history.job_times_ns.get(given) if belongs and given else None,
        new_id=new_id,
        patience=Patience(limit_s=timeout_s, sleep=sleep, clock=clock),
        now_ns=now_ns,
    )
    if link is None or (caller.alone and not link.standing):
        agreed = _without_a_store(caller, obstacle)
    elif ranks.rank == 0 and not link.standing:
        agreed = _before_the_store(caller, link)
    else:
        agreed = _through_the_store(caller, link)
    word, warnings = agreed.word, (*filter(None, [problem]), *agreed.warnings)
    if given is not None and word.run_id != given:
        warnings += (
            f"run id {given} from {origin} is ignored on rank {ranks.rank}: "
            f"rank 0 decided on {word.run_id}",
        )
    if not belongs:
        history.ranks, history.pid = told, os.getpid()
    history.calls = caller.call
    history.attempts[word.run_id] = word.attempt - first_attempt + 1
    history.job_times_ns[word.run_id] = word.job_time_ns
    history.bequeath(word.run_id, environ)
    if agreed.server is not None:
        agreed.server.start()
    return Decision(
        identity=Identity(
            run_id=word.run_id,
            attempt=word.attempt,
            rank=ranks.rank,
            local_rank=ranks.local_rank,
            world_size=ranks.world_size,
            node=node_name(environ, hostname),
            hub=word.hub,
            job_time_ns=word.job_time_ns,
        ),
        warnings=warnings,
        _server=agreed.server,
    )


def node_name(environ: Mapping[str, str], hostname: Callable[[], str] = socket.gethostname) -> str:
    """The name of this process's node: the agent, which samples it, must know it by the same one."""
    name = environ.get("TRACKAGENT_NODE") or environ.get("NODE_NAME") or hostname()
    return name[:MAX_NODE_CHARACTERS]


def given_run_id(run_id: str | None, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The run id that the user chose, as 32 lowercase hex digits, and the name of where it was
    said; (None, "") when nowhere. The argument comes before the variables; an empty variable is not
    set."""
    if run_id is not None:
        return normal_run_id(run_id, "run_id"), "run_id"
    for variable in RUN_ID_VARIABLES:
        if text := environ.get(variable):
            return normal_run_id(text, variable), variable
    return None, ""


def _hub(
    hubs: Hubs | None, ranks: Ranks, link: Link | None, given: str | None, *, belongs: bool
) -> tuple[Hub | None, str]:
    """The hub that this process names before it hears of another, and a sentence for the user, or ""."""
    if hubs is None:
        return None, ""
    if belongs:
        return (hubs.of(given) if given else None), ""
    if ranks.rank != 0:
        return None, ""
    if link is None:
        return None, hubs.unheard(ranks) if given else ""
    return hubs.name(ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Caller:
    """One rank in one call of decide(): what it knows before it hears from any other."""

    ranks: Ranks
    call: int
    given: str | None
    first_attempt: int
    hub: Hub | None
    hubs: Hubs | None
    earlier: Mapping[str, int]
    job_time_ns: int | None
    new_id: Callable[[], str]
    patience: Patience
    now_ns: Callable[[], int]

    @property
    def alone(self) -> bool:
        return self.ranks.world_size == 1

    def __str__(self) -> str:
        return f"rank {self.ranks.rank} of {self.ranks.world_size}"

    def word(self, run_id: str, number: int, job_time_ns: int) -> Word:
        """What this rank says when the job's attempts at the run so far, with this one, are `number`."""
        attempt = self.first_attempt - 1 + number
        return Word(run_id, attempt, self.hub, uuid4().hex, job_time_ns)

    def own_word(self, *, told: bool = False) -> Word:
        """Its word by its own count of attempts, without a store. told: the other ranks will hear it."""
        run_id = self.given or self.new_id()
        # Another rank, which this one cannot ask, may say another time: only rank 0's would be the job's.
        time_ns = self.now_ns() if self.ranks.rank == 0 and (self.alone or told) else 0
        time_ns = time_ns if self.job_time_ns is None else self.job_time_ns
        return self.word(run_id, self.earlier.get(run_id, 0) + 1, time_ns)

    def server(self, store: Store | None, link: Link, word: Word) -> Server:
        others = self.ranks.world_size - 1
        return Server(store, link, word, self.call, others, self.patience.clock)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Agreed:
    """The word that counts, and on rank 0 what gives it to the others, not yet started."""

    word: Word
    server: Server | None = None
    warnings: tuple[str, ...] = ()


def _without_a_store(caller: _Caller, obstacle: str) -> _Agreed:
    """Nothing can be compared: fine for a single process, and for ranks with a given run id."""
    if not caller.alone and caller.given is None:
        raise IdentityError(
            f"{caller} has no way to agree with the others on a run: {obstacle}; {REMEDY}"
        )
    return _Agreed(word=caller.own_word())


def _before_the_store(caller: _Caller, link: Link) -> _Agreed:
    """Rank 0, whose store opens when it gets to init_process_group: it must not wait for it here.
    The store is new then, and no attempt can have been counted in it."""
    word = caller.own_word(told=True)
    return _Agreed(word=word, server=caller.server(None, link, word))


def _through_the_store(caller: _Caller, link: Link) -> _Agreed:
    """Rank 0 counts the attempt in the store and will answer there; the others ask."""
    needed = not caller.alone and (link.standing or caller.given is None)
    patience = caller.patience if needed else caller.patience.at_most(SPARE_CONNECT_S)
    store = connect(link, patience)
    if store is None:
        return _store_did_not_open(caller, link, patience.limit_s)
    serves = False
    try:
        if caller.ranks.rank != 0:
            return _Agreed(word=ask(store, link, caller.call, str(caller), caller.patience))
        run_id = claim(store, caller.call, caller.given, caller.new_id, caller.patience)
        number = count(store, run_id, caller.earlier.get(run_id, 0), caller.patience)
        job_time_ns = began(store, run_id, caller.now_ns(), caller.patience)
        serves = not caller.alone
    except RuntimeError as error:
        raise IdentityError(
            f"{caller} lost {link.name} while the ranks agreed on a run: {error}; "
            "see why rank 0 or its node ended"
        ) from error
    finally:
        if not serves:
            link.close()
    word = caller.word(run_id, number, job_time_ns)
    return _Agreed(word=word, server=caller.server(store, link, word) if serves else None)


def _store_did_not_open(caller: _Caller, link: Link, waited_s: float) -> _Agreed:
    """After `waited_s`: a single process, and ranks with a given run id, go on without it."""
    if not caller.alone and caller.given is None:
        raise IdentityError(
            f"{caller} waited {waited_s:g} s for {link.name}, through which the ranks agree on "
            f"a run; {REMEDY}"
        )
    if not link.standing:
        problem = caller.hubs.unheard(caller.ranks) if caller.hubs else ""
        return _Agreed(word=caller.own_word(), warnings=tuple(filter(None, [problem])))
    warning = (
        f"{link.name} did not answer within {waited_s:g} s: "
        "the restarts of this job are not counted as attempts"
    )
    return _Agreed(word=caller.own_word(), warnings=(warning,))
