"""How ranks agree by a store whose calls may be cut off, and which may lose what it had: an agent's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from tests.client.jobs import Clock, Job, MemoryLink, MemoryStore, runs
from tests.fakes import DEADLINE_S, wait_until
from trackagent.client.broadcast import Unclear
from trackagent.client.errors import IdentityError


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job(MemoryLink(MemoryStore()))
    yield job
    job.kill()


class CutOffStore(MemoryStore):
    """A third of all calls is cut off: before they are made, or after."""

    def __init__(self, *, made: bool) -> None:
        super().__init__()
        self.made = made
        self.random = Random(7)

    def __getattribute__(self, name: str) -> Any:
        step = super().__getattribute__(name)
        if name not in ("add", "set", "get", "compare_set"):
            return step

        def cut_off(*arguments: Any) -> Any:
            if self.random.random() < 1 / 3:
                if self.made:
                    step(*arguments)
                raise Unclear("the agent is gone")
            return step(*arguments)

        return cut_off


@pytest.mark.parametrize("made", [False, True])
def test_ranks_agree_by_a_store_whose_calls_are_cut_off(made: bool) -> None:
    job = Job(MemoryLink(CutOffStore(made=made)), world_size=3)
    assert len(runs(job.all_ranks())) == 1
    job.kill()


def test_a_rank_whose_ask_is_lost_with_all_else_asks_again(job: Job) -> None:
    assert job.link is not None
    store = job.link.store
    assert store is not None
    asks = "trackagent/1/asks"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(job.rank, 1)
        wait_until(lambda: store.data.get(asks) == b"1")
        with store.lock:
            store.data.clear()
        assert runs([job.rank(0)]) == runs([other.result(DEADLINE_S)])


def test_rank_0_answers_though_its_store_has_lost_everything(job: Job) -> None:
    job.world_size = 3
    first = job.rank(0)
    assert job.link is not None
    assert job.link.store is not None
    assert runs([job.rank(1)]) == runs([first])
    with job.link.store.lock:
        job.link.store.data.clear()
    assert runs([job.rank(2)]) == runs([first])


def test_a_store_that_stays_cut_off_is_an_identity_error() -> None:
    store = MemoryStore()

    def gone(*arguments: Any) -> Any:
        raise Unclear("no route to the hub")

    for name in ("add", "set", "get", "compare_set"):
        setattr(store, name, gone)
    for rank, problem in (
        (0, "lost the store .* no route to the hub"),
        (1, "waited 60 s for rank 0"),
    ):
        clock = Clock()
        with pytest.raises(IdentityError, match=problem):
            Job(MemoryLink(store)).rank(rank, timeout_s=60, clock=clock, sleep=clock.sleep)
        assert clock.now == pytest.approx(60)
