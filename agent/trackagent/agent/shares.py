"""What the calls of a hub share: turns, and room for their bytes. Who comes first is served first.

To take what is free costs no task, no timer and no lock: thousands of calls a second go through here. For one
event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Share:
    """So much of something. What is taken is given back by whoever took it."""

    __slots__ = ("_left", "_waiting")

    def __init__(self, most: int) -> None:
        self._left = most
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, size: int, timeout_s: float) -> None:
        """Waits until so much is free. asyncio.TimeoutError when that takes longer: nothing is taken then,
        nor where the wait is cancelled."""
        if not self._waiting and size <= self._left:
            self._left -= size
            return
        loop = asyncio.get_running_loop()
        one = size, loop.create_future()
        self._waiting.append(one)
        timer = loop.call_later(timeout_s, _give_up, one[1])
        try:
            await one[1]
        except BaseException:
            if one in self._waiting:
                self._waiting.remove(one)
                self._serve()
            else:  # cancelled when it was served already
                self.give(size)
            raise
        finally:
            timer.cancel()

    def give(self, size: int) -> None:
        self._left += size
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            size, served = self._waiting[0]
            if (
                size > self._left or served.done()
            ):  # who has given up goes by itself, and calls this again
                return
            self._waiting.popleft()
            self._left -= size
            served.set_result(None)


def _give_up(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_exception(asyncio.TimeoutError())


class Host:
    """What a host has: its turns, for so many of them to read what it sends, and the calls that are there."""

    __slots__ = ("calls", "reading", "turns")

    def __init__(self, turns: int, reading: int) -> None:
        self.calls = 0
        self.turns, self.reading = Share(turns), Share(reading)


class Callers:
    """Those who share room for so many bytes. hosts: those with calls."""

    __slots__ = ("_reading", "_turns", "hosts", "room")

    def __init__(self, room: int, turns_of_a_host: int, reading_of_a_host: int) -> None:
        self.room = Share(room)
        self.hosts: dict[str, Host] = {}
        self._turns, self._reading = turns_of_a_host, reading_of_a_host

    def of(self, name: str) -> Host:
        host = self.hosts.get(name)
        if host is None:
            host = self.hosts[name] = Host(self._turns, self._reading)
        return host
