"""The rules about a node: counters that grow, states, and how long something lasts."""

from __future__ import annotations

import pytest

from tests.agent.store.batches import RUN, producer
from trackagent.agent.collect.contract import Sample
from trackagent.agent.health.alarms import Finding
from trackagent.agent.health.hardware import NodeView, findings, readings
from trackagent.agent.health.settings import Thresholds


class Node:
    """A node that is looked at every second."""

    def __init__(self) -> None:
        self.view = NodeView()
        self.thresholds = Thresholds()
        self.now_s = 100.0
        self.values: dict[str, float] = {}
        self.ranks: dict[str, float] = {}

    def look(self, seconds: int = 1, **values: float) -> list[Finding]:
        self.values |= {key.replace("__", "/"): value for key, value in values.items()}
        for _ in range(seconds):
            self.now_s += 1
            rank = Sample(self.ranks, rank=producer(3, world_size=4))
            samples = [Sample(self.values), *([rank] if self.ranks else [])]
            self.view.take(readings(samples), self.now_s)
        return findings(self.view, self.thresholds, self.now_s)


@pytest.fixture
def node() -> Node:
    return Node()


COUNTERS = [
    ("gpu/0/ecc_uncorrected_errors_total", "hardware", "error", "GPU 0: uncorrected ECC errors"),
    ("gpu/1/retired_pages_double_bit", "hardware", "error", "GPU 1: pages retired"),
    ("gpu/1/remapped_rows_uncorrected", "hardware", "error", "GPU 1: rows remapped"),
    ("gpu/7/nvlink_crc_errors_total", "hardware", "warning", "GPU 7: NVLink crc errors"),
    ("gpu/7/nvlink_recovery_errors_total", "hardware", "warning", "NVLink recovery errors"),
    ("infiniband/mlx5_0/1/link_downed_total", "hardware", "error", "InfiniBand mlx5_0/1: times"),
    ("infiniband/mlx5_0/1/symbol_errors_total", "hardware", "warning", "mlx5_0/1: symbol errors"),
    ("cgroup/memory/oom_kills_total", "memory", "error", "killed by the kernel for lack of memory"),
]


@pytest.mark.parametrize(("key", "rule", "level", "said"), COUNTERS)
def test_errors_that_are_counted_fire_when_there_are_more_and_are_over_after_a_minute(
    node: Node, key: str, rule: str, level: str, said: str
) -> None:
    assert node.look(**{key: 5.0}) == []
    assert node.look(10) == []
    [finding] = node.look(**{key: 7.0})
    assert (finding.rule, finding.level, finding.run_id) == (rule, level, "")
    assert finding.numbers == {"key": key, "more": 2.0, "total": 7.0}
    assert said in finding.message
    assert [one.numbers["more"] for one in node.look(30, **{key: 8.0})] == [3.0]
    assert node.look(61) == []


def test_a_counter_that_begins_at_0_again_is_no_error(node: Node) -> None:
    node.look(**{"gpu/0/nvlink_crc_errors_total": 100.0})
    assert node.look(**{"gpu/0/nvlink_crc_errors_total": 0.0}) == []
    assert len(node.look(**{"gpu/0/nvlink_crc_errors_total": 1.0})) == 1


def test_a_rank_whose_group_ran_out_of_memory_is_told_in_its_run(node: Node) -> None:
    node.ranks = {"cgroup/memory/oom_kills_total": 0.0}
    node.look()
    node.ranks = {"cgroup/memory/oom_kills_total": 1.0}
    [finding] = node.look()
    assert finding.run_id == RUN
    assert "of the control group of rank 3: 1 more" in finding.message


def test_a_row_that_cannot_be_remapped_stays_an_error(node: Node) -> None:
    [finding] = node.look(100, **{"gpu/2/remapped_rows_failed": 1.0})
    assert (finding.level, finding.numbers["value"]) == ("error", 1.0)
    assert node.look(**{"gpu/2/remapped_rows_failed": 0.0}) == []


def test_a_port_that_was_active_and_is_down_is_told(node: Node) -> None:
    state = "infiniband/mlx5_0/1/state"
    assert node.look(**{state: 1.0}) == []  # nobody has plugged anything in
    assert node.look(**{state: 4.0}) == []
    [finding] = node.look(**{state: 1.0})
    assert finding.message == "InfiniBand mlx5_0/1 is down: its state is 1, it was 4"
    assert node.look(**{state: 4.0}) == []


THROTTLES = [("hw_thermal", "warning"), ("hw_power_brake", "warning"), ("sw_power_cap", "info")]


@pytest.mark.parametrize(("why", "level"), THROTTLES)
def test_a_busy_gpu_that_is_throttled_for_long_is_told(node: Node, why: str, level: str) -> None:
    key = f"gpu/0/throttle/{why}"
    busy = {"gpu/0/utilization_percent": 99.0, "gpu/0/temperature_celsius": 88.0}
    assert node.look(10, **{key: 1.0}, **busy) == []
    [finding] = node.look()
    assert finding.level == level
    assert finding.numbers == {
        "key": key,
        "since_s": 10.0,
        "busy_percent": 99.0,
        "temperature_celsius": 88.0,
    }
    assert node.look(**{"gpu/0/utilization_percent": 10.0}) == []
    assert len(node.look(**{"gpu/0/utilization_percent": 99.0})) == 1
    assert node.look(**{key: 0.0}) == []


def test_an_idle_gpu_with_low_clocks_is_not_throttled(node: Node) -> None:
    values = {"gpu/0/throttle/idle": 1.0, "gpu/0/utilization_percent": 60.0}
    assert node.look(60, **values) == []


@pytest.mark.parametrize(
    ("used", "expected"),
    [(91.9, None), (92.0, ("warning", 0.92)), (96.9, ("warning", 0.92)), (97.0, ("error", 0.97))],
)
@pytest.mark.parametrize("key", ["system/memory/used_percent", "cgroup/memory/used_percent"])
def test_memory_pressure(
    node: Node, key: str, used: float, expected: tuple[str, float] | None
) -> None:
    told = [(one.level, one.numbers["limit"]) for one in node.look(**{key: used})]
    assert told == ([] if expected is None else [expected])


def test_a_file_system_that_is_nearly_full(node: Node) -> None:
    assert node.look(**{"system/filesystem/root/used_percent": 96.0}) == []
    values = {"used_percent": 98.0, "free_bytes": 2e9}
    full = {f"system/filesystem/root/{name}": value for name, value in values.items()}
    [finding] = node.look(**full)
    assert finding.message == "the file system root is 98.0 % full, 2.0 GB left"


def test_a_healthy_node_fires_nothing_for_an_hour(node: Node) -> None:
    healthy = {
        "gpu/0/utilization_percent": 95.0,
        "gpu/0/temperature_celsius": 70.0,
        "gpu/0/throttle/hw_thermal": 0.0,
        "gpu/0/ecc_corrected_errors_total": 3.0,
        "infiniband/mlx5_0/1/state": 4.0,
        "infiniband/mlx5_0/1/symbol_errors_total": 12.0,
        "cgroup/memory/oom_kills_total": 1.0,
        "system/memory/used_percent": 80.0,
        "system/filesystem/root/used_percent": 60.0,
    }
    node.look(**healthy)
    for _ in range(60):
        assert node.look(60) == []
