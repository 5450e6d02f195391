"""The agent's process: takes its folders, starts the parts, and stops them in an order that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import grp
import importlib.metadata
import logging
import math
import os
import shutil
import signal
import socket
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trackagent.agent.store as store
from trackagent.agent import hubserver, server, tls, way
from trackagent.agent.access import Access
from trackagent.agent.active import Active
from trackagent.agent.arrivals import Arrivals, AtTheHub, Ranges
from trackagent.agent.collect.contract import Here
from trackagent.agent.collect.recorder import Recorder
from trackagent.agent.collect.sampler import Sampler
from trackagent.agent.collect.table import intervals
from trackagent.agent.config import DATABASES, LOCK_NAME, QUARANTINE_NAME, SPOOL_NAME, AgentConfig
from trackagent.agent.deadletters import DeadLetters
from trackagent.agent.errors import AgentError
from trackagent.agent.forwarding import HUB_BACKOFF_S, Forwarding
from trackagent.agent.gate import Gate
from trackagent.agent.health.hardware import readings
from trackagent.agent.health.hooks import Hooks
from trackagent.agent.health.progress import progress
from trackagent.agent.health.settings import OF_RUNS
from trackagent.agent.health.telling import Telling
from trackagent.agent.health.watch import Watch
from trackagent.agent.hubserver import HubServer, table_of
from trackagent.agent.limits import allow_files, give_memory_back
from trackagent.agent.lingering import linger
from trackagent.agent.lock import ROOM, Lock, OwnFile, held, is_full
from trackagent.agent.meeting import Table
from trackagent.agent.orphans import Orphans
from trackagent.agent.owners import Owners
from trackagent.agent.pipeline import MAX_BACKOFF_S, Pipeline
from trackagent.agent.policies import Policies
from trackagent.agent.present import Present, RecentEvents
from trackagent.agent.quarantine import Quarantine
from trackagent.agent.reducing import Reducer
from trackagent.agent.routes import Routes
from trackagent.agent.sinks.forward import UPSTREAM_SINK, upstream_sink
from trackagent.agent.sinks.store import StoreSink
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import EventData, NotFound, ProducerInfo, Writer
from trackagent.client.trust import check_file, check_folder, private_folder
from trackagent.protos.v1 import agent_pb2

if TYPE_CHECKING:
    from trackagent.agent.scrapes import Scrapes

logger = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
HOOKS_STOP_S = 2.0
TRIM_INTERVAL_S = 1.0
WATCH_INTERVAL_S = 0.5
# On the disk of the state, to begin.
NEEDED_BYTES = 256 * 1024
# How long an agent whose folder was deleted tries to make another: the deleting may still be going on.
RENEWAL_PATIENCE_S = 10.0
# Through the gate, for commands that ask how the agent is doing.
OTHER_CONNECTIONS = 64


def serve(config: AgentConfig) -> int:
    """Runs an agent until SIGTERM, SIGINT or, unless that was ignored, SIGHUP, then drains it; the exit code.
    AgentError when it cannot start."""
    logging.getLogger("trackagent").setLevel(config.log_level.upper())
    # The gate has two more for each connection, and so has the port for other nodes.
    each = (1 if config.group is None else 3) + (3 if config.listen else 0)
    allow_files(config.max_streams, each=each)
    give_memory_back()
    started_ns = time.time_ns()
    version = importlib.metadata.version("trackagent")
    if config.group is not None:
        try:
            grp.getgrnam(config.group)
        except KeyError:
            raise AgentError(f"there is no group {config.group!r}: give another --group") from None
    with _private_files():
        asyncio.run(_begin(config, version, started_ns))
    return 0


async def _begin(config: AgentConfig, version: str, started_ns: int) -> None:
    """Until told to stop; anew, in folders made anew, where they were deleted meanwhile."""
    about = {
        "pid": os.getpid(),
        "started_ns": started_ns,
        "version": version,
        "directory": str(config.directory),
    }
    stop = asyncio.Event()
    renewed_until = -math.inf
    while True:
        try:
            take_folders(config)
            with (
                held(config.lock_path, about) as lock,
                held(config.state_directory / LOCK_NAME, about) as state_lock,
            ):
                gone = await _run(config, version, started_ns, stop, [lock, state_lock])
        except (AgentError, store.StoreError, OSError) as error:
            if stop.is_set() or time.monotonic() >= renewed_until:
                raise AgentError(_advised(error, config)) from error
            await asyncio.sleep(WATCH_INTERVAL_S)
            continue
        if not gone:
            return
        renewed_until = time.monotonic() + RENEWAL_PATIENCE_S


def _advised(error: Exception, config: AgentConfig) -> str:
    """What went wrong at the start, and what to do."""
    said = str(error)
    with contextlib.suppress(OSError):
        full = shutil.disk_usage(config.state_directory).free < NEEDED_BYTES
        if full and ROOM not in said:
            said += (
                f"; {ROOM}: {config.state_directory} has less than {NEEDED_BYTES // 1024} KiB left"
            )
    return said


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    """What is made meanwhile is for this user alone."""
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def take_folders(config: AgentConfig) -> None:
    """Makes the agent's folders. AgentError when one cannot be used, or when another user could meddle with
    what is there or has put something there."""
    try:
        _check_folders(config)
    except OSError as error:
        what = str(error.strerror)  # with its advice, where trust.py refuses
        if error.filename:
            room = f"{ROOM}, or " if is_full(error) else ""
            what = f"{error.filename}: {what}; {room}give others with --dir and --state"
        raise AgentError(f"cannot use the agent's folders: {what}") from error


def _check_folders(config: AgentConfig) -> None:
    state = config.state_directory
    for folder in (config.directory, state):
        private_folder(folder)
        if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, "not writable", str(folder))
    inner = [
        base / name for base in (config.directory, state) for name in ("journals", QUARANTINE_NAME)
    ]
    inner += [config.dead_letters_path, config.hub_path]
    inner += [path for path in config.dead_letters_path.glob("*") if not path.is_file()]
    for folder in inner:
        if os.path.lexists(folder) and not folder.is_file():
            check_folder(folder)
    names = [f"{name}{end}" for name in DATABASES for end in ("", "-wal", "-shm")]
    for file in (
        config.lock_path,
        state / LOCK_NAME,
        config.policies_path,
        config.way_path,
        *(state / name for name in names),
    ):
        check_file(file)
        with contextlib.suppress(FileNotFoundError):
            file.chmod(0o600)


async def _run(
    config: AgentConfig, version: str, started_ns: int, stop: asyncio.Event, locks: Sequence[Lock]
) -> bool:
    """Until `stop` is set; whether it ended before, since a lock file or the socket was gone."""
    with contextlib.ExitStack() as opened:
        spool = Spool(config.state_directory / SPOOL_NAME, max_bytes=config.spool_bytes)
        opened.callback(spool.close)
        writer = store.open_writer(config.store_path)
        opened.callback(writer.close)
        routes = _routes(config)
        opened.callback(routes.close)
        hubserver.forget(config)
        hub = HubServer(config) if config.listen else None
        if hub is not None:
            opened.callback(hub.close)
        table = table_of(config)
        opened.callback(table.close)
        access = None if config.group is None else await _access(config, spool)
        if access is not None:
            opened.callback(access.owners.close)
        scrapes = None
        if config.prometheus:
            # Imported here and below: only who asks for it pays for its libraries.
            from trackagent.agent.scrapes import Scrapes

            scrapes = opened.enter_context(Scrapes(config.prometheus))
        # Whatever goes wrong: the interpreter cannot end beside a server of gRPC's that has not been stopped.
        async with contextlib.AsyncExitStack() as begun:
            return await _serve(
                config,
                version,
                started_ns,
                spool,
                writer,
                routes,
                hub,
                table,
                access,
                stop,
                locks,
                scrapes,
                begun,
            )


async def _serve(
    config: AgentConfig,
    version: str,
    started_ns: int,
    spool: Spool,
    writer: Writer,
    routes: Routes,
    hub: HubServer | None,
    table: Table,
    access: Access | None,
    stop: asyncio.Event,
    locks: Sequence[Lock],
    scrapes: Scrapes | None,
    begun: contextlib.AsyncExitStack,
) -> bool:
    active = Active(spool, _node(config))
    sampler = _sampler(config, spool, active, access)
    hooks = Hooks(
        command=config.hook_command, url=config.hook_url, interval_s=config.hook_interval_s
    )
    events = RecentEvents()
    watch = _watch(config, active, sampler, hooks, events)
    present = Present(
        node=_node(config),
        version=version,
        sampling=sampler,
        ranks=active.ranks,
        progress=lambda: progress(watch, config),
        events=events,
    )
    dead_letters = partial(
        DeadLetters, config.dead_letters_path, max_bytes=config.dead_letter_bytes
    )
    reducer = partial(
        Reducer,
        policies=Policies(config.policies_path),
        keep_all_ranks=config.keep_all_ranks,
        keep_node_ranks=config.keep_node_ranks,
    )
    sink = upstream_sink(config, _node(config)) if config.store else StoreSink(writer)
    (other,) = {StoreSink.name, UPSTREAM_SINK} - {sink.name}
    await asyncio.to_thread(way.take, spool, config.way_path, config.store, sink.name, other)
    pipeline = Pipeline(
        spool,
        sink,
        interval_s=config.forward_interval_s if config.store else config.deliver_interval_s,
        dead_letters=dead_letters(sink.name),
        observer=watch,
        reducer=reducer(stores=not config.store),
        wanted=lambda info: not info.hub,
        opens=not config.store,
        max_backoff_s=HUB_BACKOFF_S if config.store else MAX_BACKOFF_S,
    )
    forwarding = Forwarding(
        spool,
        routes,
        node=_node(config),
        interval_s=config.forward_interval_s,
        dead_letters=dead_letters,
        reducer=reducer(stores=False),
        elsewhere=bool(config.store),
        connect=lambda address, pin: tls.channel(address, pin=pin, files=tls.Files.of(config)),
        pin="" if hub is None else hub.pin,
        guests=None if hub is None else hub.tokens,
    )
    arrivals = Arrivals(spool, _before(config, begun), passes_on=bool(config.store))
    quarantine = Quarantine(
        [config.quarantine_path, config.directory / QUARANTINE_NAME],
        max_bytes=config.quarantine_bytes,
    )

    lost_before: dict[str, int] | None = None
    with contextlib.suppress(store.StoreError):
        lost_before = await asyncio.to_thread(_lost, config)

    async def describe(response: agent_pb2.StatusResponse) -> None:
        nonlocal lost_before
        response.pid = os.getpid()
        response.start_time_ns = started_ns
        response.directory = str(config.directory)
        response.state_directory = str(config.state_directory)
        response.store = config.store
        if hub is not None:
            response.listen, response.pin = hub.address, hub.pin
        response.spool.max_bytes = config.spool_bytes
        # In threads: the store may be locked, and nothing here may hold the ranks up.
        try:
            lost = await asyncio.to_thread(_lost, config)
        except store.StoreError as error:
            response.lost_unknown = str(error)
        else:
            response.lost_records.update(lost)
            lost_before = lost if lost_before is None else lost_before
            response.lost_since_start = sum(lost.values()) - sum(lost_before.values())
        response.quarantine.max_bytes = config.quarantine_bytes
        with contextlib.suppress(OSError):
            held = await asyncio.to_thread(quarantine.held)
            response.quarantine.items, response.quarantine.bytes = held.items, held.size
            response.quarantine.deleted = held.deleted
        running = {one.sink_name: one for one in (pipeline, *forwarding.pipelines())}
        for sink in response.sinks:
            if (feeding := running.get(sink.name)) is not None:
                sink.state, sink.error = feeding.state, feeding.error
                letters = await asyncio.to_thread(feeding.dead_letters)
                sink.dead_letters, sink.dead_letter_bytes = letters

    servicer = server.Servicer(
        spool, config, version, describe, access, present.look, forwarding.route, table
    )
    orphans = Orphans(
        spool,
        config.directory,
        config.state_directory,
        config.quarantine_path,
        claim=None if access is None else access.claim_own,
        route=forwarding.route,
        connected=servicer.is_connected,
        gone_after_s=config.gone_after_s,
    )
    hurried = asyncio.Event()

    def told_to_stop() -> None:
        if stop.is_set():
            hurried.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # nohup has it ignored: the agent outlives its terminal then.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, told_to_stop)
    # First: a rank that finds the socket looks at once for what the agent says of a hub.
    if hub is not None:
        begun.push_async_callback(hub.stop, 0.0)
        await hub.start(arrivals, table, version)
    elif config.store:
        hubserver.say(config, store=True)
    path = config.socket_path if access is None else config.inner_socket_path
    try:
        # Whoever connects to a socket that a killed agent left is refused; the lock says that it is nobody's.
        config.socket_path.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        listening = await server.start(servicer, f"unix:{path}", config.max_batch_bytes)
        begun.push_async_callback(listening.stop, 0.0)
        path.chmod(0o600)
        if access is not None:
            access.gate.start()
        sockets = [OwnFile(config.socket_path), OwnFile(path)]
    except OSError as error:
        raise AgentError(f"{error}; give another --dir") from error
    _open_to_group(config)
    pipeline.start()
    await asyncio.to_thread(forwarding.start)
    orphans.start()
    sampler.start()
    hooks.start()
    watch.start()
    trimming = asyncio.create_task(_trim(quarantine))
    if scrapes is not None:
        from trackagent.agent.prometheus import Exposition, Sources

        sources = Sources(
            config=config,
            node=_node(config),
            version=version,
            started_ns=started_ns,
            spool=spool,
            pipeline=pipeline,
            sampler=sampler,
            streams=servicer.streams,
            lost=partial(_lost, config),
            held=quarantine.held,
        )
        scrapes.start(Exposition(sources).render)
        logger.info("Prometheus can read %s", scrapes.url)
    logger.info("trackagent %s listens at unix:%s", version, config.socket_path)
    if config.store:
        logger.info("everything is delivered to the hub at %s", config.store)
    else:
        logger.info("runs are stored in %s", config.store_path)

    missing = await _gone(stop, locks, [*sockets, *locks])
    trimming.cancel()
    if missing is None:
        logger.info("stopping: taking what is under way, then delivering what is spooled")
        if hub is not None:
            await linger(
                spool,
                partial(store.open_reader, config.store_path, timeout_s=1.0),
                since_ns=started_ns,
                limit_s=config.linger_s,
                hurried=hurried,
            )
    else:
        logger.error("%s was deleted or replaced under this agent: it begins anew", missing)
    await listening.stop(STOP_GRACE_S)
    if hub is not None:
        await hub.stop(STOP_GRACE_S)
    elif config.store:
        hubserver.forget(config)
    await asyncio.to_thread(arrivals.close)
    if sockets[0].is_there():
        config.socket_path.unlink(missing_ok=True)
    if access is not None:
        await access.gate.stop()
    await asyncio.to_thread(watch.stop)
    await asyncio.to_thread(sampler.stop)
    await asyncio.to_thread(orphans.stop)
    # Who begins anew does not let the ranks wait for a sink.
    drain_s = config.drain_timeout_s if missing is None else 0.0
    await asyncio.gather(
        asyncio.to_thread(pipeline.stop, drain_s), asyncio.to_thread(forwarding.stop, drain_s)
    )
    await asyncio.to_thread(hooks.stop, HOOKS_STOP_S)
    left = (await asyncio.wrap_future(spool.statistics()))["batches"]
    if missing is not None:
        return True
    if left:
        what = "1 batch stays" if left == 1 else f"{left} batches stay"
        logger.warning("%s in the spool: the next agent here delivers what is left", what)
    else:
        where = "at the hub" if config.store else "stored"
        logger.info("stopped; everything received is %s", where)
    return False


def _sampler(config: AgentConfig, spool: Spool, active: Active, access: Access | None) -> Sampler:
    return Sampler(
        intervals(config.collect, config.sample_interval_s),
        Here(ranks=active.ranks, folders=(config.directory, config.state_directory)),
        active,
        Recorder(spool, _node(config), claim=None if access is None else access.claim_own),
    )


def _watch(
    config: AgentConfig, active: Active, sampler: Sampler, hooks: Hooks, events: RecentEvents
) -> Watch:
    telling = Telling(active, hooks, _node(config))

    def passed(event: EventData, info: ProducerInfo) -> None:
        telling.passed(event, info)
        events.take(event, info)

    return Watch(
        config,
        rules=config.health_rules() - (OF_RUNS if config.store else frozenset()),
        readings=lambda: readings(
            sample for latest in sampler.latest().values() for sample in latest.samples
        ),
        tell=telling.tell,
        passed=passed,
    )


def _node(config: AgentConfig) -> str:
    return config.node or socket.gethostname()


async def _gone(stop: asyncio.Event, locks: Sequence[Lock], own: Sequence[OwnFile]) -> Path | None:
    """Waits until `stop` is set, None then, or until a file of its own is no longer where it was. Meanwhile
    locks that found no room say whose they are as soon as they do."""
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(stop.wait(), WATCH_INTERVAL_S)
            return None
        for file in own:
            if not file.is_there():
                return file.path
        for lock in locks:
            with contextlib.suppress(OSError):  # a courtesy
                lock.say()


async def _trim(quarantine: Quarantine) -> None:
    told = ""
    while True:
        try:
            await asyncio.to_thread(quarantine.trim)
        except OSError as error:
            if str(error) != told:
                logger.warning("cannot keep the quarantine small: %s; trying again", error)
            told = str(error)
        await asyncio.sleep(TRIM_INTERVAL_S)


def _routes(config: AgentConfig) -> Routes:
    try:
        return Routes(config.routes_path, config.quarantine_path)
    except (OSError, sqlite3.Error) as error:
        raise AgentError(
            f"cannot open {config.routes_path}, which says where runs go that other agents take: {error}"
        ) from error


async def _access(config: AgentConfig, spool: Spool) -> Access:
    """What the users of the group may do. AgentError when it cannot be known."""

    def is_stored(run_id: str) -> bool:
        with contextlib.closing(store.open_reader(config.store_path, timeout_s=1.0)) as reader:
            try:
                reader.run(run_id)
            except NotFound:
                return False
            return True

    try:
        private_folder(config.inner_socket_path.parent)
        owners = Owners(config.owners_path, config.quarantine_path, is_stored)
        known = await asyncio.wrap_future(spool.producers())
        owners.claim_unknown((info.run_id, info.producer_id) for info in known)
    except (OSError, sqlite3.Error) as error:
        raise AgentError(
            f"cannot open {config.owners_path}, which says whose each run is: {error}"
        ) from error
    gate = Gate(
        config.socket_path,
        config.inner_socket_path,
        max_connections=config.max_streams + OTHER_CONNECTIONS,
    )
    return Access(gate, owners)


def _before(config: AgentConfig, begun: contextlib.AsyncExitStack) -> Callable[[str], Ranges]:
    """Asks what had come of another agent's spool before this agent's spool was, until the end of `begun`."""
    if config.store:
        hub = upstream_sink(config, _node(config))
        begun.callback(hub.close)
        return AtTheHub(hub)

    def in_the_store(origin: str) -> Ranges:
        with contextlib.closing(store.open_reader(config.store_path, timeout_s=1.0)) as reader:
            return reader.ranges(origin)

    return in_the_store


def _lost(config: AgentConfig) -> dict[str, int]:
    """By reason, what is lost in the runs of the store; StoreError when it does not answer soon."""
    with contextlib.closing(store.open_reader(config.store_path, timeout_s=1.0)) as reader:
        return reader.all_losses()


def _open_to_group(config: AgentConfig) -> None:
    if config.group is None:
        return
    try:
        # A folder that is not the agent's alone (/run) and that everyone may enter stays as it is.
        if not config.directory.stat().st_mode & stat.S_IXOTH:
            shutil.chown(config.directory, group=config.group)
            config.directory.chmod(0o710)
        shutil.chown(config.socket_path, group=config.group)
        config.socket_path.chmod(0o660)
    except OSError as error:
        raise AgentError(
            f"cannot open the socket to the group {config.group!r}: {error}"
        ) from error
