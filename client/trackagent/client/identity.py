"""Who this process is: its run, attempt and rank, the same run and attempt on every rank of a job.

Rank 0 decides and its word counts; broadcast.py is how the word travels.

Promised: all ranks that return agree, or IdentityError after a bounded wait. Not promised:
agreement when ranks call init() unequally often, or when run ids are given to some ranks only and
there is no store to compare them in.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
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
    find_link,
    normal_run_id,
    whole_number,
)
from trackagent.client.errors import ConfigError, IdentityError
from trackagent.client.hub import Hub

MAX_NODE_CHARACTERS = 253  # a DNS name's limit, and Kubernetes'
SPARE_CONNECT_S = 5.0  # where the store is of use but not needed

# What a rank tells the processes that it starts, in their environment; JSON.
RANK_PROCESS = "TRACKAGENT_RANK_PROCESS"
# By these a process that a rank has started tells itself from a rank of its own, or of another job.
_LAUNCHERS_SAY = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMIX_NAMESPACE",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
)
# Frameworks set them in the rank itself, after init(): they count where they were there before.
_SET_LATER = {"MASTER_ADDR", "MASTER_PORT"}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What a launcher says about this process."""

    rank: int
    local_rank: int
    world_size: int


@dataclass(slots=True)
class History:
    """What one process, and those that it was forked or started from, have decided so far. job_times_ns: by
    run, its job's. ranks: what the last of them that was a rank was told; pid: that one's."""

    calls: int = 0
    attempts: dict[str, int] = field(default_factory=dict)
    inherited: set[str] = field(default_factory=set)
    job_times_ns: dict[str, int] = field(default_factory=dict)
    ranks: Ranks | None = None
    pid: int = 0

    def belongs_to(self, ranks: Ranks) -> bool:
        """Whether this process was forked or started by the rank that it takes itself for."""
        return ranks == self.ranks and os.getpid() != self.pid

    def inherit(self, ranks: Ranks, environ: Mapping[str, str]) -> None:
        """In a process that was started by the rank that it takes itself for: what that one has decided."""
        with contextlib.suppress(KeyError, ValueError, TypeError):
            said = json.loads(environ[RANK_PROCESS])
            launcher = _launcher(environ)
            for name in _SET_LATER - said["launcher"].keys():
                launcher.pop(name, None)
            same = said["launcher"] == launcher and Ranks(**said["ranks"]) == ranks
            if same and said["pid"] != os.getpid():
                self.ranks, self.pid = ranks, int(said["pid"])
                self.attempts[said["run_id"]] = int(said["attempts"])
                self.job_times_ns[said["run_id"]] = int(said["job_time_ns"])

    def bequeath(self, run_id: str, environ: MutableMapping[str, str]) -> None:
        """Tells the processes that this one starts whose they are: they have its environment, and would take
        themselves for the rank. Given the run's id, they are of its attempt."""
        if self.ranks is not None and self.pid == os.getpid():
            said = {
                "pid": self.pid,
                "ranks": asdict(self.ranks),
                "launcher": _launcher(environ),
                "run_id": run_id,
                "attempts": self.attempts[run_id] - 1,  # before theirs
                "job_time_ns": self.job_times_ns[run_id],
            }
            environ[RANK_PROCESS] = json.dumps(said)


_HISTORY = History()


def _launcher(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: environ[name] for name in _LAUNCHERS_SAY if environ.get(name)}


def run_is_inherited(run_id: str, history: History = _HISTORY) -> None:
    """In a process that was forked by a rank of this run: where it begins this run itself, as another rank or
    beside that one, it takes part in the same attempt."""
    if run_id in history.attempts and run_id not in history.inherited:
        history.inherited.add(run_id)
        history.attempts[run_id] -= 1


def run_has_ended(
    run_id: str, environ: MutableMapping[str, str] = os.environ, history: History = _HISTORY
) -> None:
    """What this process starts from now on, and begins the run again, is its next attempt, as this one itself
    would be."""
    with contextlib.suppress(KeyError, ValueError, TypeError):
        said = json.loads(environ[RANK_PROCESS])
        if said["run_id"] == run_id and said["pid"] == os.getpid():
            environ[RANK_PROCESS] = json.dumps(said | {"attempts": history.attempts[run_id]})


def decide(
    *,
    run_id: str | None,
    timeout_s: float,
    hub: Hub | None = None,
    environ: MutableMapping[str, str] = os.environ,
    history: History = _HISTORY,
    find: Finder | None = None,
    hostname: Callable[[], str] = socket.gethostname,
    new_id: Callable[[], str] = lambda: uuid4().hex,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    now_ns: Callable[[], int] = time.time_ns,
) -> Decision:
    """The identity of this process in the next run of its job; to be called once for each init(),
    by the main process of a rank, on every rank equally often.

    Notes in `environ` what processes that this one starts need to know. Returns within about twice
    `timeout_s`. On rank 0 of a job it leaves a daemon thread that gives its word to the others. ConfigError
    names an unusable argument or variable; IdentityError says what was waited for. A call that raises does
    not count: the next one takes its place.
    """
    given, origin = given_run_id(run_id, environ)
    first_attempt = whole_number(
        "TRACKAGENT_ATTEMPT", environ.get("TRACKAGENT_ATTEMPT") or "1", least=1
    )
    link, group, obstacle = (find or find_link)(environ)
    ranks = _ranks_here(group, environ)
    told = ranks
    if history.ranks is None and group is None:
        history.inherit(ranks, environ)
    belongs = history.belongs_to(ranks)
    if belongs:
        # The rank that made it speaks with the others. This one has a run of its own, or is one more
        # process of the run that it was given.
        link = None
        ranks = ranks if given else Ranks(rank=0, local_rank=0, world_size=1)
    caller = _Caller(
        ranks=ranks,
        call=history.calls + 1,
        given=given,
        first_attempt=first_attempt,
        hub=hub,
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
    word, warnings = agreed.word, agreed.warnings
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


def launcher_ranks(environ: Mapping[str, str]) -> Ranks | None:
    """What torchrun (or anything that sets RANK and WORLD_SIZE), mpirun or srun says, in this
    order; None without any. mpirun comes before srun: it starts its daemons with srun, and their
    SLURM_PROCID reaches the ranks."""
    # Batch scripts often export WORLD_SIZE alone and take the rank from srun: only both are an
    # answer.
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        local = next(
            (
                name
                for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
                if environ.get(name)
            ),
            None,
        )
        return _ranks(environ, "RANK", local, "WORLD_SIZE")
    if environ.get("OMPI_COMM_WORLD_RANK") and environ.get("OMPI_COMM_WORLD_SIZE"):
        return _ranks(
            environ, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"
        )
    # The batch script itself has SLURM_PROCID 0 and SLURM_NTASKS n, but no step: it is one process.
    if environ.get("SLURM_STEP_ID") and environ.get("SLURM_PROCID"):
        size = "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        if environ.get(size):
            return _ranks(environ, "SLURM_PROCID", "SLURM_LOCALID", size)
    for present, absent, harmless in (("WORLD_SIZE", "RANK", "1"), ("RANK", "WORLD_SIZE", "0")):
        if (text := environ.get(present, "")) not in ("", harmless):
            raise ConfigError(f"{present} is {text!r} but {absent} is not set: set both or neither")
    return None


def _ranks_here(group: tuple[int, int] | None, environ: Mapping[str, str]) -> Ranks:
    """This process's ranks; a process group that exists (rank, world size) knows better than
    variables: one Slurm task may have spawned eight ranks."""
    told = launcher_ranks(environ) or Ranks(rank=0, local_rank=0, world_size=1)
    if group is None:
        return told
    rank, world_size = group
    local_rank = whole_number("LOCAL_RANK", environ.get("LOCAL_RANK") or str(told.local_rank))
    return Ranks(rank=rank, local_rank=local_rank, world_size=world_size)


def _ranks(environ: Mapping[str, str], rank: str, local_rank: str | None, world_size: str) -> Ranks:
    ranks = Ranks(
        rank=whole_number(rank, environ[rank]),
        local_rank=whole_number(local_rank, environ.get(local_rank) or "0") if local_rank else 0,
        world_size=whole_number(world_size, environ[world_size], least=1),
    )
    if ranks.rank >= ranks.world_size:
        raise ConfigError(
            f"{rank} is {ranks.rank} but {world_size} is {ranks.world_size}: ranks count from 0"
        )
    return ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class _Caller:
    """One rank in one call of decide(): what it knows before it hears from any other."""

    ranks: Ranks
    call: int
    given: str | None
    first_attempt: int
    hub: Hub | None
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
    try:
        if caller.ranks.rank != 0:
            return _Agreed(word=ask(store, link, caller.call, str(caller), caller.patience))
        run_id = claim(store, caller.call, caller.given, caller.new_id)
        number = count(store, run_id, caller.earlier.get(run_id, 0))
        job_time_ns = began(store, run_id, caller.now_ns())
    except RuntimeError as error:
        raise IdentityError(
            f"{caller} lost {link.name} while the ranks agreed on a run: {error}; "
            "see why rank 0 or its node ended"
        ) from error
    word = caller.word(run_id, number, job_time_ns)
    return _Agreed(word=word, server=None if caller.alone else caller.server(store, link, word))


def _store_did_not_open(caller: _Caller, link: Link, waited_s: float) -> _Agreed:
    """After `waited_s`: a single process, and ranks with a given run id, go on without it."""
    if not caller.alone and caller.given is None:
        raise IdentityError(
            f"{caller} waited {waited_s:g} s for {link.name}, through which the ranks agree on "
            f"a run; {REMEDY}"
        )
    if not link.standing:
        return _Agreed(word=caller.own_word())
    warning = (
        f"{link.name} did not answer within {waited_s:g} s: "
        "the restarts of this job are not counted as attempts"
    )
    return _Agreed(word=caller.own_word(), warnings=(warning,))
