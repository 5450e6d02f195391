"""The gate of an agent that serves a group: tells the service which user each connection is from.

gRPC does not say who connected to a unix socket. So the gate listens at the public socket, asks the kernel
for the user (SO_PEERCRED), and passes the bytes on, as they are, to the service's own socket in a folder of
the agent's user alone. Its end of that second connection has a name of its own, in which the user stands;
that name is what gRPC shows as the peer.

All of it runs in the loop that starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
from collections import Counter
from collections.abc import Coroutine
from itertools import count
from pathlib import Path
from typing import Any

from trackagent.client.trust import is_unmapped

logger = logging.getLogger(__name__)

CHUNK_BYTES = 128 * 1024
BACKLOG = 128
RETRY_S = 0.1
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class Gate:
    """Listens at `path` for the service at `inner`.

    max_connections: of all users together; one who does not run the agent may have half of them. Further ones
    are closed at once, and senders come back later.
    """

    def __init__(self, path: Path, inner: Path, *, max_connections: int) -> None:
        self._path, self._inner = path, inner
        self._most = max_connections
        # In the names of this gate's ends, so that nobody else's can look like one.
        self._token = secrets.token_hex(8)
        self._numbers = count()
        self._connections: Counter[int] = Counter()
        self._told: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listens; the socket is for the agent's user alone until its mode is changed. OSError when it
        cannot be made."""
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.setblocking(False)
            listener.bind(str(self._path))
            self._path.chmod(0o600)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        self._spawn(self._accept(listener))

    async def stop(self) -> None:
        """Ends all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def user_of(self, peer: str) -> int | None:
        """The user behind a peer as gRPC names it; None for one that did not come through this gate."""
        token, _, rest = peer.removeprefix("unix-abstract:trackagent-").partition("-")
        uid = rest.rpartition("-")[2]
        return int(uid) if token == self._token and uid.isdecimal() else None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        told = False
        with listener:
            while True:
                try:
                    client, _ = await loop.sock_accept(listener)
                except OSError as error:
                    # Most likely no descriptor is left.
                    if not told:
                        logger.warning("cannot take a connection: %s; trying again", error)
                    told = True
                    await asyncio.sleep(RETRY_S)
                else:
                    told = False
                    self._spawn(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as inner:
            client.setblocking(False)
            inner.setblocking(False)
            credentials = client.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
            )
            uid = _CREDENTIALS.unpack(credentials)[1]
            # Users outside of this user namespace all look like one.
            if is_unmapped(uid) or not self._may_connect(uid):
                return
            self._connections[uid] += 1
            try:
                inner.bind(f"\0trackagent-{self._token}-{next(self._numbers)}-{uid}")
                await asyncio.get_running_loop().sock_connect(inner, str(self._inner))
                await _pass_on(client, inner)
            except OSError as error:
                logger.debug("a connection of user %d ended: %s", uid, error)
            finally:
                self._connections[uid] -= 1

    def _may_connect(self, uid: int) -> bool:
        own = uid == os.geteuid()
        if self._connections.total() < self._most and (
            own or self._connections[uid] < self._most // 2
        ):
            return True
        # Once: who comes and goes at the limit must not fill the log.
        if uid not in self._told:
            self._told.add(uid)
            logger.warning(
                "user %d has %d connections of %d: further ones are closed until there is room "
                "(max_streams)",
                uid,
                self._connections[uid],
                self._connections.total(),
            )
        return False


async def _pass_on(one: socket.socket, other: socket.socket) -> None:
    """Both ways until both ends have ended, or one has failed."""
    ways = [asyncio.create_task(_pump(one, other)), asyncio.create_task(_pump(other, one))]
    try:
        await asyncio.gather(*ways)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _pump(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, CHUNK_BYTES):
        await loop.sock_sendall(target, data)
    with contextlib.suppress(OSError):  # it may be gone already
        target.shutdown(socket.SHUT_WR)
