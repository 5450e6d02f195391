"""How a run's hub ends that lives only as long as the job: once the ranks of all nodes have.

The agents of the other nodes end a moment later than rank 0's, with the last that their ranks logged. So a
hub that is told to stop, and whose own ranks of a run have ended, goes on taking what others forward until
the store has the ends of all, or its time is up. What came too late waits on those nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Callable

from trackagent.agent.errors import AgentError
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import NotFound, Reader, StoreError

logger = logging.getLogger(__name__)

LOOK_S = 0.25


async def linger(
    spool: Spool,
    open_reader: Callable[[], Reader],
    *,
    since_ns: int,
    limit_s: float,
    hurried: asyncio.Event,
) -> None:
    """Waits for the other nodes' ranks of the runs that began here since then (nanoseconds since 1970), at
    most limit_s or until `hurried` is set. Runs that go on here are not waited for: who stops an agent under
    its ranks has reasons. A spool that fails ends the wait: what it has is still to be delivered."""
    try:
        awaited = await _begun(spool, since_ns)
    except (AgentError, sqlite3.Error) as error:
        logger.warning("cannot tell which runs other nodes' ranks log to: %s; not waiting", error)
        return
    deadline = asyncio.get_running_loop().time() + limit_s
    told = False
    while awaited and not hurried.is_set():
        awaited = await asyncio.to_thread(_unfinished, awaited, open_reader)
        left_s = deadline - asyncio.get_running_loop().time()
        if not awaited or left_s <= 0:
            break
        if not told:
            told = True
            names = ", ".join(sorted(run_id[:8] for run_id in awaited))
            logger.info(
                "waiting up to %.0f s for other nodes' ranks of %s; a second signal ends it",
                left_s,
                names,
            )
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(hurried.wait(), min(LOOK_S, left_s))
    for run_id in sorted(awaited):
        logger.warning(
            "run %s: ranks of other nodes have not ended; what comes of them waits there for the next hub",
            run_id[:8],
        )


async def _begun(spool: Spool, since_ns: int) -> set[str]:
    begun = {
        info.run_id
        for info in await asyncio.wrap_future(spool.producers())
        if not (info.sampled or info.hub) and info.world_size > 1 and info.start_time_ns >= since_ns
    }
    return begun - {info.run_id for info in await asyncio.wrap_future(spool.not_ended())}


def _unfinished(runs: set[str], open_reader: Callable[[], Reader]) -> set[str]:
    """Of these, those of which a rank has not ended, or has not been heard of; or nothing is stored yet."""
    found = set()
    try:
        with contextlib.closing(open_reader()) as reader:
            for run_id in runs:
                try:
                    run = reader.run(run_id)
                except NotFound:
                    found.add(run_id)
                    continue
                if run.status == "running" or run.ranks < run.world_size:
                    found.add(run_id)
    except (StoreError, AgentError, sqlite3.Error) as error:
        logger.debug("cannot look which ranks have ended: %s", error)
        return runs
    return found
