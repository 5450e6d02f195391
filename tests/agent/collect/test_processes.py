"""What the ranks' processes take: real processes, found by the locks of their journals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.agent.collect.sampled import all_values, sleeping
from tests.agent.samples import producer
from tests.fakes import Folders, wait_until
from trackagent.agent.collect import processes
from trackagent.agent.collect.contract import Here, Incident, Sample, Unavailable
from trackagent.agent.collect.metrics import metrics_of
from trackagent.agent.store.contract import ProducerInfo

PSS = "process/memory/pss_bytes"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def here(folder: Path, *ranks: ProducerInfo, clock: Clock | None = None) -> Here:
    return Here(ranks=lambda: ranks, folders=[folder], clock=clock or Clock())


def test_a_rank_is_sampled_under_its_own_name(tmp_path: Path) -> None:
    with sleeping(tmp_path, producer(3)) as rank:
        (first, *_) = processes.make(here(tmp_path, rank)).sample()
    assert isinstance(first, Sample)
    assert first.rank == rank
    assert first.values["process/threads"] == 1.0
    assert first.values["process/memory/rss_bytes"] > 1e6


def test_everything_that_is_sampled_is_on_the_page(tmp_path: Path) -> None:
    clock = Clock()
    with sleeping(tmp_path, producer(3)) as rank:
        collector = processes.make(here(tmp_path, rank, clock=clock))
        collector.sample()
        clock.now += 10.0
        found = all_values(collector.sample())
    assert found.keys() == {metric.key for metric in metrics_of("processes")}


def test_time_is_in_percent_of_a_core(tmp_path: Path) -> None:
    clock = Clock()
    with sleeping(tmp_path, producer(3), program="while True: pass") as rank:
        collector = processes.make(here(tmp_path, rank, clock=clock))
        collector.sample()
        clock.now += 1.0  # of ours: what of it the process has had is for the system to say
        found = wait_until(lambda: _busy(collector, clock))
    assert found["process/cpu/percent"] > 0


def _busy(collector: processes.Processes, clock: Clock) -> dict[str, float] | None:
    found = all_values(collector.sample())
    clock.now += 1.0
    return found if found.get("process/cpu/percent") else None


def test_pss_is_read_once_a_minute_and_of_one_rank_at_a_time(tmp_path: Path) -> None:
    clock = Clock()
    with sleeping(tmp_path, producer(0)) as first, sleeping(tmp_path, producer(1)) as second:
        collector = processes.make(here(tmp_path, first, second, clock=clock))
        read = []
        for _ in range(75):
            found = collector.sample()
            read.append(sum(isinstance(one, Sample) and PSS in one.values for one in found))
            clock.now += 1.0
    assert read == [0] * 10 + [1, 1] + [0] * 58 + [1, 1] + [0] * 3


def test_the_number_of_another_namespace_is_found_by_the_lock(folders: Folders) -> None:
    # In memory, as journals are: where file systems lie over each other, the kernel may tell other numbers.
    with sleeping(folders.directory, producer(3)) as rank:
        inside = producer(3, pid=1)
        (first, *_) = processes.make(here(folders.directory, inside)).sample()
        assert isinstance(first, Sample)
        assert first.rank == inside
        assert rank.pid != 1


def test_a_process_with_the_ranks_number_that_is_not_the_rank_is_not_sampled(
    tmp_path: Path,
) -> None:
    mine = producer(3, pid=os.getpid())
    assert processes.make(here(tmp_path, mine)).sample() == []


def test_a_rank_that_ended_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    with sleeping(tmp_path, producer(0)) as first:
        with sleeping(tmp_path, producer(1)) as second:
            collector = processes.make(here(tmp_path, first, second))
            collector.sample()
        found: list[Sample | Incident] = list(collector.sample())
    assert {one.rank for one in found if isinstance(one, Sample)} == {first}


def test_a_system_without_proc_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no processes can be seen"):
        processes.make(Here(proc=tmp_path))
