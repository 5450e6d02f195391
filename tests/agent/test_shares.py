"""What calls share: who comes first is served first, and what is not taken is not lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.fakes import DEADLINE_S
from trackagent.agent.shares import Share


class Takers:
    """Those who take, each in a task, and in which order they were served."""

    def __init__(self, most: int) -> None:
        self.share = Share(most)
        self.served: list[str] = []

    async def _take(self, name: str, size: int, timeout_s: float) -> None:
        await self.share.take(size, timeout_s)
        self.served.append(name)

    def begin(self, name: str, size: int, timeout_s: float = DEADLINE_S) -> asyncio.Task[None]:
        return asyncio.create_task(self._take(name, size, timeout_s))


def running(most: int, test: Callable[[Takers], Awaitable[None]]) -> list[str]:
    async def main() -> list[str]:
        takers = Takers(most)
        await asyncio.wait_for(test(takers), DEADLINE_S)
        return takers.served

    return asyncio.run(main())


async def turn() -> None:
    """Lets everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_comes_first_is_served_first() -> None:
    async def test(takers: Takers) -> None:
        tasks = [takers.begin("a", 3), takers.begin("large", 2), takers.begin("small", 1)]
        await turn()
        assert takers.served == ["a"]  # there is room for the small one, whose turn it is not
        takers.share.give(1)
        await turn()
        assert takers.served == ["a", "large"]
        takers.share.give(1)
        await asyncio.gather(*tasks)

    assert running(4, test) == ["a", "large", "small"]


def test_who_gives_up_takes_nothing_and_holds_nobody_up() -> None:
    async def test(takers: Takers) -> None:
        await takers.begin("a", 3)
        large, small = takers.begin("large", 4, timeout_s=0.01), takers.begin("small", 1)
        await small
        with pytest.raises(asyncio.TimeoutError):
            await large
        takers.share.give(4)
        await takers.begin("all", 4)

    assert running(4, test) == ["a", "small", "all"]


@pytest.mark.parametrize("served", [False, True])
def test_who_is_cancelled_takes_nothing(served: bool) -> None:
    async def test(takers: Takers) -> None:
        await takers.begin("a", 1)
        waiting, behind = takers.begin("waiting", 1), takers.begin("behind", 1)
        await turn()
        if served:  # and has not run since
            takers.share.give(1)
        waiting.cancel()
        if not served:
            takers.share.give(1)
        await behind
        assert waiting.cancelled()

    assert running(1, test) == ["a", "behind"]
