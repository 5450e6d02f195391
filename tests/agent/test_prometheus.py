"""What Prometheus reads: an agent's health and its last samples, by documented names, whatever hangs."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.agent.collect.gpus import UUID, hopper
from tests.agent.collect.sampled import Told
from tests.agent.samples import RUN_ID, journal, log_losses, producer
from tests.agent.sinks import FakeSink
from tests.fakes import (
    COMMAND,
    DEADLINE_S,
    AgentProcess,
    Folders,
    next_line,
    start_script,
    wait_until,
)
from tests.fakes_nvml import fake_nvml
from trackagent.agent.active import Active
from trackagent.agent.collect.contract import Here, Sample
from trackagent.agent.collect.metrics import metrics_of
from trackagent.agent.collect.nvml import Nvml
from trackagent.agent.collect.recorder import Recorder
from trackagent.agent.collect.sampler import Sampler
from trackagent.agent.collect.table import COLLECTORS
from trackagent.agent.config import AgentConfig
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.prometheus import MAX_REASONS, Exposition, Sources, exposed
from trackagent.agent.quarantine import Held
from trackagent.agent.spool import Spool

OwnAgent = Callable[..., AgentProcess]
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
ANY = ("--prometheus", "127.0.0.1:0", "--node", "a", "--deliver-interval-s", "0.02")
GROUP = grp.getgrgid(os.getegid()).gr_name
PARTS = {"spool", "dead_letters", "losses", "quarantine"}
RANK = """
import sys
from trackagent import client
run = client.init("x")
run.log({"loss": 1.0}, 0)
print(run.id, flush=True)
sys.stdin.read()
run.finish()
"""
# What every reader of a database with a log takes its share of: SQLite's WAL_READ_LOCKs.
LOCKED = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(file, fcntl.LOCK_EX, 5, 123)
print("locked", flush=True)
sys.stdin.read()
"""

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def series(text: str) -> Series:
    """Every series of an answer; AssertionError where one is there twice."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            key = one.name, frozenset(one.labels.items())
            assert key not in found
            found[key] = one.value
    return found


def scraped(agent: AgentProcess) -> Series:
    url = re.findall(r"Prometheus can read (\S+)", agent.output)[-1]
    with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
        return series(answer.read().decode())


def value(found: Series, name: str, **labels: str) -> float | None:
    return found.get((name, frozenset(labels.items())))


def read_parts(found: Series) -> set[str]:
    """Which parts could be read."""
    return {
        dict(labels)["part"]
        for (name, labels), one in found.items()
        if name == "trackagent_scrape_part_success" and one
    }


def labels_named(found: Series, label: str) -> set[str]:
    """The values of a label, over all series."""
    return {dict(labels)[label] for _, labels in found if label in dict(labels)}


# --- a real agent


def test_what_an_agent_received_and_stored_is_counted(
    own_agent: OwnAgent, folders: Folders
) -> None:
    target = journal(folders)
    log_losses(target, range(100))
    target.close()
    agent = own_agent(*ANY).start()
    agent.wait_for_status(RUN_ID, "killed")

    def drained() -> Series | None:
        found = scraped(agent)
        received = value(found, "trackagent_spool_received_bytes_total")
        behind = value(found, "trackagent_sink_batches_behind", sink="store")
        return found if received and behind == 0 else None

    found = wait_until(drained)
    assert read_parts(found) == PARTS
    assert value(found, "trackagent_spool_batches") == 0
    assert value(found, "trackagent_sink_last_accepted_timestamp_seconds", sink="store")
    assert sorted(one for (name, _), one in found.items() if name == "trackagent_sink_state") == [
        *(0, 0, 0, 1)
    ]


def test_the_node_and_its_ranks_are_shown_by_name_and_label(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent(*ANY, "--collect", "system,processes").start()
    with start_script(folders, RANK, TRACKAGENT_NODE="a") as rank:
        run_id = next_line(rank)

        def both() -> bool:
            found = scraped(agent)
            cpu = value(found, "trackagent_system_cpu_percent", node="a")
            of = {"node": "a", "run_id": run_id, "rank": "0"}
            rss = value(found, "trackagent_process_memory_rss_bytes", **of)
            streams = value(found, "trackagent_streams")
            return cpu is not None and bool(rss) and streams == 1

        wait_until(both)
        assert rank.stdin is not None
        rank.stdin.close()


def test_an_agent_of_a_group_tells_every_user_nothing_of_runs(
    own_agent: OwnAgent, folders: Folders
) -> None:
    agent = own_agent(*ANY, "--collect", "system,processes", "--group", GROUP).start()
    with start_script(folders, RANK, TRACKAGENT_NODE="a") as rank:
        next_line(rank)

        wait_until(lambda: value(scraped(agent), "trackagent_streams") == 1)
        then = time.time()

        def sampled() -> Series | None:
            """With a sample of the ranks that was taken since."""
            found = scraped(agent)
            name = "trackagent_collector_last_sample_timestamp_seconds"
            last = value(found, name, collector="processes")
            cpu = value(found, "trackagent_system_cpu_percent", node="a")
            return found if last and last > then + 1 and cpu is not None else None

        found = wait_until(sampled)
        assert rank.stdin is not None
        rank.stdin.close()
    assert labels_named(found, "run_id") == set()
    assert read_parts(found) == PARTS - {"losses", "quarantine"}
    assert [name for name, _ in found if "lost" in name or "quarantine" in name] == []


def test_a_locked_store_keeps_no_scrape_waiting(own_agent: OwnAgent, folders: Folders) -> None:
    agent = own_agent(*ANY).start()
    command = [sys.executable, "-c", LOCKED, str(folders.state / "store.db-shm")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert next_line(holder) == "locked"
        found = scraped(agent)
        assert read_parts(found) == PARTS - {"losses"}
        assert value(found, "trackagent_spool_bytes") == 0
        assert holder.stdin is not None
        holder.stdin.close()
    wait_until(lambda: read_parts(scraped(agent)) == PARTS)


def test_an_agent_that_is_not_asked_to_does_not_listen(own_agent: OwnAgent) -> None:
    agent = own_agent("--node", "a").start()
    assert "Prometheus" not in agent.output
    assert agent.process is not None
    process = Path(f"/proc/{agent.process.pid}")
    own = set()
    for link in (process / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            own.add(os.readlink(link))
    assert any(link.startswith("socket:") for link in own)
    connections = [
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in (process / "net" / table).read_text().splitlines()[1:]
    ]
    assert [inode for inode in connections if f"socket:[{inode}]" in own] == []


def test_who_does_not_ask_for_it_does_not_import_it() -> None:
    program = "import sys, trackagent.agent.daemon; print('prometheus_client' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_a_port_that_is_taken_is_told_at_the_start(own_agent: OwnAgent, tmp_path: Path) -> None:
    agent = own_agent(*ANY).start()
    where = re.findall(r"Prometheus can read http://([^/]+)", agent.output)[-1]
    done = subprocess.run(
        [COMMAND, "start", "--prometheus", where],
        env=Folders(tmp_path / "dir", tmp_path / "state").environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        1,
        [
            f"trackagent: cannot listen at {where} for Prometheus: Address already in use; give another "
            "--prometheus"
        ],
    )


# --- what is shown of what


@pytest.fixture
def exposition(
    spool: Spool, start: Callable[..., Pipeline], folders: Folders
) -> Iterator[Callable[..., Callable[[], str]]]:
    """exposition(makes, lost): what renders an answer, with these collectors and losses."""
    with contextlib.ExitStack() as ends:

        def made(
            makes: Mapping[str, Any] | None = None,
            lost: Callable[[], Mapping[str, int]] = dict,
            patience_s: float = DEADLINE_S,
        ) -> Callable[[], str]:
            sampler = Sampler(
                dict.fromkeys(makes or {}, 1.0),
                Here(),
                Active(spool),
                Recorder(spool, "a"),
                makes=makes,
            )
            sampler.start()
            ends.callback(sampler.stop)
            sources = Sources(
                config=AgentConfig(
                    directory=folders.directory, state_directory=folders.state, node="a"
                ),
                node="a",
                version="1.2.3",
                started_ns=1,
                spool=spool,
                pipeline=start(FakeSink("store")),
                sampler=sampler,
                streams=lambda: 0,
                lost=lost,
                held=lambda: Held(0, 0, 0),
            )
            wait_until(lambda: all(one.state != "starting" for one in sampler.states().values()))
            rendering = Exposition(sources, patience_s=patience_s, shown_s=0.0)
            return lambda: rendering.render().decode()

        yield made


def test_a_gpu_is_named_by_index_and_uuid(
    exposition: Callable[..., Callable[[], str]],
) -> None:
    render = exposition({"gpu": lambda here: Nvml(library=fake_nvml([hopper(0), hopper(1)]))})
    found = wait_until(lambda: of_gpus(series(render())))
    assert {gpu: value(found, "trackagent_gpu_power_watts", **about(gpu)) for gpu in "01"} == {
        "0": 431.5,
        "1": 431.5,
    }
    assert value(found, "trackagent_gpu_energy_joules_total", **about("0")) == 5000
    assert value(found, "trackagent_gpu_lost", **about("1")) == 0


def about(gpu: str) -> dict[str, str]:
    return {"node": "a", "gpu": gpu, "uuid": UUID.format(gpu)}


def of_gpus(found: Series) -> Series | None:
    return found if "trackagent_gpu_power_watts" in {name for name, _ in found} else None


def test_what_a_failing_collector_had_read_is_not_shown(
    exposition: Callable[..., Callable[[], str]],
) -> None:
    told = Told(lambda: [Sample({"system/load_1m": 2.0})])
    render = exposition({"system": told.make})
    wait_until(
        lambda: value(series(render()), "trackagent_system_load_1m", node="a") == 2.0,
    )

    def fail() -> list[Sample]:
        raise OSError("gone")

    told.answer = fail

    def is_failing() -> bool:
        found = series(render())
        state = {"collector": "system", "state": "failing"}
        return value(found, "trackagent_collector_state", **state) == 1

    wait_until(is_failing)
    assert value(series(render()), "trackagent_system_load_1m", node="a") is None


def test_of_two_attempts_of_a_rank_the_later_is_shown(
    exposition: Callable[..., Callable[[], str]],
) -> None:
    def sample(attempt: int, threads: float) -> Sample:
        rank = producer(0, attempt=attempt, producer_id=bytes([attempt]) * 16)
        return Sample({"process/threads": threads}, rank=rank)

    told = Told(lambda: [sample(1, 10.0), sample(2, 20.0)])
    render = exposition({"processes": told.make})
    of = {"node": "a", "run_id": RUN_ID, "rank": "0"}
    assert wait_until(lambda: value(series(render()), "trackagent_process_threads", **of)) == 20.0


def test_losses_are_counted_by_reason(exposition: Callable[..., Callable[[], str]]) -> None:
    found = series(exposition(lost=lambda: {'a "full" disk\n': 3})())
    assert value(found, "trackagent_lost_records_total", reason='a "full" disk\n') == 3


def test_reasons_of_losses_are_bounded(exposition: Callable[..., Callable[[], str]]) -> None:
    found = series(exposition(lost=lambda: {f"reason {n}": n for n in range(1, 1001)})())
    counts = {k: v for k, v in found.items() if k[0] == "trackagent_lost_records_total"}
    assert (len(counts), sum(counts.values())) == (MAX_REASONS + 1, 500_500)


def test_a_part_that_hangs_is_missing_and_not_asked_again(
    exposition: Callable[..., Callable[[], str]],
) -> None:
    let_go = threading.Event()
    asked: list[int] = []

    def lost() -> Mapping[str, int]:
        asked.append(1)
        let_go.wait(DEADLINE_S)
        return {"x": 1}

    render = exposition(lost=lost, patience_s=0.2)
    try:
        assert [read_parts(series(render())) & {"losses"} for _ in range(3)] == [set()] * 3
        assert asked == [1]
    finally:
        let_go.set()
    wait_until(lambda: "losses" in read_parts(series(render())))


# --- names


def test_keys_become_names_by_one_rule() -> None:
    assert [
        (name, dict(labels))
        for name, _, labels in (
            exposed("system", "system/cpu/percent"),
            exposed("system", "system/network/eth0.1/receive_errors_total"),
            exposed("infiniband", "infiniband/mlx5_0/1/state"),
            exposed("gpu", "gpu/0.1/throttled/power_percent"),
        )
    ] == [
        ("trackagent_system_cpu_percent", {}),
        ("trackagent_system_network_receive_errors_total", {"interface": "eth0.1"}),
        ("trackagent_infiniband_state", {"device": "mlx5_0", "port": "1"}),
        ("trackagent_gpu_throttled_power_percent", {"gpu": "0.1"}),
    ]


def test_every_key_has_a_name_of_its_own_that_prometheus_takes() -> None:
    keys = {
        (name, re.sub(r"\{\w+\}", "x", metric.key))
        for name in COLLECTORS
        for metric in metrics_of(name)
    }
    names = [exposed(collector, key) for collector, key in keys]
    assert len({name for name, _, _ in names}) == len(keys)
    pattern = re.compile(r"trackagent_[a-z0-9_]+")
    assert [name for name, about, _ in names if not (about and pattern.fullmatch(name))] == []
    reserved = ("_info", "_count", "_sum", "_bucket", "_created")
    assert [name for name, _, _ in names if name.endswith(reserved)] == []


def test_every_name_of_the_agents_own_is_listed(
    exposition: Callable[..., Callable[[], str]],
) -> None:
    nvml = {"gpu": lambda here: Nvml(library=fake_nvml([hopper(0)]))}
    sampled = {exposed("gpu", re.sub(r"\{\w+\}", "x", one.key))[0] for one in metrics_of("gpu")}
    render = exposition(nvml, lost=lambda: {"x": 1})
    found = wait_until(lambda: of_gpus(series(render())))
    shown = {name for name, _ in found if name.startswith("trackagent_")} - sampled
    listed = set(re.findall(r"`(trackagent_\w+)`", DOCS.read_text()))
    # The sink of this test has accepted nothing yet.
    assert shown | {"trackagent_sink_last_accepted_timestamp_seconds"} == listed
