"""What an agent samples beside a run: in the store once, through whatever happens to the agent."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from tests.fakes import AgentProcess, Folders, next_line, start_script, wait_until
from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import ExportBlock, Series, StoreError, node_run_id

RANK = """
import sys
from trackagent import client
run = client.init("x")
run.log({"loss": 1.0}, 0)
print(run.id, flush=True)
sys.stdin.read()
run.finish()
"""
NODE = "node-of-this-test"
RSS = ("process/memory/rss_bytes", "rank 0")
CPU = ("system/cpu/percent", f"node {NODE}")


@pytest.fixture
def sampling(folders: Folders) -> Iterator[AgentProcess]:
    """An agent that samples, not yet started."""
    variables = {"TRACKAGENT_COLLECT": "system,processes", "TRACKAGENT_NODE": NODE}
    agent = AgentProcess(folders, "--deliver-interval-s", "0.02", variables=variables)
    yield agent
    agent.close()


@pytest.fixture
def read(folders: Folders) -> Callable[[str, tuple[str, str]], Series | None]:
    """read(run, (key, source)): the series, None while there is none."""

    def found(run_id: str, series: tuple[str, str]) -> Series | None:
        try:
            with contextlib.closing(open_reader(folders.state / "store.db")) as reader:
                return reader.series(run_id, *series)
        except StoreError:
            return None

    return found


def test_samples_arrive_once_also_over_a_kill_of_the_agent(
    sampling: AgentProcess,
    folders: Folders,
    read: Callable[[str, tuple[str, str]], Series | None],
) -> None:
    def points(run_id: str, series: tuple[str, str]) -> int:
        found = read(run_id, series)
        return 0 if found is None else len(found.steps)

    sampling.start()
    with start_script(folders, RANK, TRACKAGENT_NODE=NODE) as rank:
        run_id = next_line(rank)
        wait_until(lambda: points(run_id, RSS) and points(run_id, CPU))
        sampling.kill()
        before = {series: points(run_id, series) for series in (RSS, CPU)}
        sampling.start()
        for series, count in before.items():
            wait_until(lambda s=series, n=count: points(run_id, s) >= n + 1)
        assert rank.stdin is not None
        rank.stdin.close()
    run = sampling.wait_for_status(run_id, "finished")
    assert run.records_stored == run.records_logged == 1
    for series in (RSS, CPU):
        found = read(run_id, series)
        assert found is not None
        # Of one second there may be two: the agent that was killed and the next one sampled.
        assert len(set(found.times_ns.tolist())) == len(found.times_ns)
    stored = list(exported(folders, CPU[1]))
    assert len(stored) == len(set(stored))
    # One that samples is no rank.
    assert "no ranks connected" in sampling.run_cli("status").stdout


def exported(folders: Folders, source: str) -> Iterator[tuple[str, int, float]]:
    """Every point of the node, as stored: key, time and value."""
    with contextlib.closing(open_reader(folders.state / "store.db")) as reader:
        blocks: list[ExportBlock] = list(reader.export(node_run_id(NODE), samples=True))
    for block in blocks:
        assert block.source == source
        for key, row in zip(block.keys, block.values.tolist(), strict=True):
            yield from zip([key] * len(row), block.times_ns.tolist(), row, strict=True)


def test_an_agent_that_is_told_to_sample_nothing_does_not(
    folders: Folders, read: Callable[[str, tuple[str, str]], Series | None]
) -> None:
    with contextlib.closing(AgentProcess(folders).start()) as agent:
        with start_script(folders, RANK) as rank:
            run_id = next_line(rank)
            assert rank.stdin is not None
            rank.stdin.close()
        agent.wait_for_status(run_id, "finished")
        with contextlib.closing(open_reader(folders.state / "store.db")) as reader:
            assert reader.samples_list(run_id) == []
