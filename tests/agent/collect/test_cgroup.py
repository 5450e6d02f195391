"""Control groups of both versions, from files of our own and from the kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.collect.sampled import all_values, sleeping
from tests.agent.samples import producer
from tests.groups import memory_group
from trackagent.agent.collect import cgroup
from trackagent.agent.collect.contract import Here, Sample, Unavailable
from trackagent.agent.collect.metrics import metrics_of

PRESSURE = "some avg10=0.00 avg60=0.00 avg300=0.00 total={some}\nfull avg10=0 total={full}\n"


class Groups:
    """A /proc and a /sys/fs/cgroup of our own, and a clock."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys, self.now = root / "proc", root / "sys", 0.0
        self.base = self.sys / "fs" / "cgroup"
        self.base.mkdir(parents=True)

    def say(self, folder: str, **files: object) -> None:
        (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self.base / folder / name.replace("__", ".")).write_text(f"{text}\n")

    def put(self, process: object, *lines: str) -> None:
        (self.proc / str(process)).mkdir(parents=True, exist_ok=True)
        (self.proc / str(process) / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    @property
    def here(self) -> Here:
        return Here(proc=self.proc, sys=self.sys, clock=lambda: self.now)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


@pytest.fixture
def second_version(groups: Groups) -> Groups:
    groups.say("", cgroup__controllers="cpu memory")
    groups.say("pod", cpu__max="max 100000", memory__max="1000")
    groups.put("self", "0::/pod/job")
    groups.say(
        "pod/job",
        cpu__max="150000 100000",
        cpu__stat="usage_usec 0\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0",
        memory__current="700",
        memory__max="max",
        memory__stat="anon 1\ninactive_file 200",
        memory__swap__current="30",
        memory__events="low 0\noom 3\noom_kill 2",
        cpu__pressure=PRESSURE.format(some=0, full=0),
    )
    return groups


@pytest.fixture
def first_version(groups: Groups) -> Groups:
    groups.put("self", "9:name=systemd:/", "4:memory:/job", "2:cpu,cpuacct:/job", "0::/")
    groups.say("cpu/job", cpu__stat="nr_periods 0\nnr_throttled 0\nthrottled_time 0")
    groups.say("cpu/job", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    groups.say("cpu", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    groups.say("cpuacct/job", cpuacct__usage="0")
    groups.say("memory", memory__limit_in_bytes="1000")
    groups.say(
        "memory/job",
        memory__usage_in_bytes="700",
        memory__limit_in_bytes="9223372036854771712",
        memory__stat="inactive_file 1\ntotal_inactive_file 200",
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 2",
    )
    return groups


@pytest.fixture(params=["first_version", "second_version"])
def version(request: pytest.FixtureRequest) -> Groups:
    found: Groups = request.getfixturevalue(request.param)
    return found


def test_memory_is_what_is_used_and_what_cannot_go(version: Groups) -> None:
    found = all_values(cgroup.make(version.here).sample())
    assert found["cgroup/memory/current_bytes"] == 700
    assert found["cgroup/memory/working_set_bytes"] == 500
    assert found["cgroup/memory/oom_kills_total"] == 2


def test_the_limit_is_the_least_of_the_groups_around_it(version: Groups) -> None:
    found = all_values(cgroup.make(version.here).sample())
    assert found["cgroup/memory/limit_bytes"] == 1000
    assert found["cgroup/memory/used_percent"] == 50.0


def test_the_quota_of_processors_is_in_cores(
    groups: Groups, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("second_version")
    assert all_values(cgroup.make(groups.here).sample())["cgroup/cpu/limit_cores"] == 1.5


def test_the_quota_of_the_first_version_is_that_of_the_group_around_it(
    first_version: Groups,
) -> None:
    assert all_values(cgroup.make(first_version.here).sample())["cgroup/cpu/limit_cores"] == 0.5


def test_time_is_in_percent_of_a_core(second_version: Groups) -> None:
    collector = cgroup.make(second_version.here)
    collector.sample()
    second_version.say(
        "pod/job",
        cpu__stat="usage_usec 1500000\nnr_periods 10\nnr_throttled 4\nthrottled_usec 250000",
        cpu__pressure=PRESSURE.format(some=100000, full=50000),
    )
    second_version.now += 1.0
    found = all_values(collector.sample())
    assert found["cgroup/cpu/percent"] == 150.0
    assert found["cgroup/cpu/throttled_percent"] == 25.0
    assert found["cgroup/cpu/throttled_periods_percent"] == pytest.approx(40.0)
    assert found["cgroup/pressure/cpu_some_percent"] == 10.0
    assert found["cgroup/pressure/cpu_full_percent"] == 5.0


def test_time_of_the_first_version_is_in_percent_of_a_core_too(first_version: Groups) -> None:
    collector = cgroup.make(first_version.here)
    collector.sample()
    first_version.say("cpuacct/job", cpuacct__usage="1500000000")
    first_version.say(
        "cpu/job", cpu__stat="nr_periods 10\nnr_throttled 4\nthrottled_time 250000000"
    )
    first_version.now += 1.0
    found = all_values(collector.sample())
    assert found["cgroup/cpu/percent"] == 150.0
    assert found["cgroup/cpu/throttled_percent"] == 25.0


def test_a_path_that_only_the_host_knows_means_the_group_that_is_seen(groups: Groups) -> None:
    groups.say("memory", memory__usage_in_bytes="5")
    groups.put("self", "4:memory:/docker/0123456789")
    found = all_values(cgroup.make(groups.here).sample())
    assert found["cgroup/memory/current_bytes"] == 5


def test_a_group_that_says_nothing_makes_no_sample(groups: Groups) -> None:
    groups.put("self", "0::/")
    assert cgroup.make(groups.here).sample() == []


def test_a_system_without_groups_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no control groups: there is no "):
        cgroup.make(Here(sys=tmp_path))


# --- the kernel's


def test_this_systems_own_group_says_what_the_page_lists() -> None:
    found = all_values(cgroup.make(Here()).sample())
    patterns = [metric.pattern for metric in metrics_of("cgroup")]
    assert found
    assert [key for key in found if not any(one.fullmatch(key) for one in patterns)] == []


@pytest.fixture
def group() -> Iterator[Path]:
    with memory_group(64 * 2**20) as made:
        yield made


def test_a_rank_in_a_group_of_its_own_is_sampled_by_itself(group: Path, tmp_path: Path) -> None:
    with sleeping(tmp_path, producer(3)) as rank:
        (group / "cgroup.procs").write_text(str(rank.pid))
        found = cgroup.make(Here(ranks=lambda: [rank], folders=[tmp_path])).sample()
    of_rank = [one for one in found if isinstance(one, Sample) and one.rank is not None]
    assert [one.rank for one in of_rank] == [rank]
    assert of_rank[0].values["cgroup/memory/limit_bytes"] == 64 * 2**20


def test_a_rank_in_the_agents_group_is_no_series_of_its_own(tmp_path: Path) -> None:
    with sleeping(tmp_path, producer(3)) as rank:
        found = cgroup.make(Here(ranks=lambda: [rank], folders=[tmp_path])).sample()
    assert rank.pid != os.getpid()
    assert rank not in [one.rank for one in found if isinstance(one, Sample)]
