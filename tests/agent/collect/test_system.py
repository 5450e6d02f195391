"""What the node as a whole is doing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.collect.sampled import all_values
from tests.fakes import wait_until
from trackagent.agent.collect import system
from trackagent.agent.collect.contract import Here, Unavailable
from trackagent.agent.collect.metrics import metrics_of

NET = """Inter-|   Receive                             |  Transmit
 face |bytes packets errs drop (and four more) |bytes packets errs drop (and four more)
    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0
  eth0: {received} 10 1 2 0 0 0 0 {sent} 20 3 4 0 0 0 0
veth12: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0
"""
STAT = (
    "cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\n"
    "cpu0 {busy} 0 0 0 0 0 0 0 0 0\n"
    "cpu1 0 0 0 {idle} 0 0 0 0 0 0\nintr 1\n"
)
DISK = (
    " 254       0 vda 10 0 {sectors} 5 20 0 8 5 0 {busy_ms} 10 0 0 0 0 0 0\n"
    " 254 1 vda1 1 1 1 1 1 1 1 1 1 1 1\n"
)
MEMORY = (
    "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 250 kB\nSwapTotal: 10 kB\nSwapFree: 4 kB\n"
)


class Node:
    """A /proc and a /sys of our own, and a clock."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys, self.now = root / "proc", root / "sys", 0.0
        (self.proc / "net").mkdir(parents=True)
        (self.sys / "block" / "vda").mkdir(parents=True)
        (self.sys / "block" / "loop0").mkdir()
        (self.proc / "loadavg").write_text("1.50 2.50 3.50 1/234 5678\n")
        (self.proc / "meminfo").write_text(MEMORY)
        self.say()

    def say(
        self, received: int = 0, sent: int = 0, busy: int = 0, idle: int = 0, **disk: int
    ) -> None:
        (self.proc / "net" / "dev").write_text(NET.format(received=received, sent=sent))
        (self.proc / "stat").write_text(STAT.format(busy=busy, idle=idle))
        (self.proc / "diskstats").write_text(DISK.format(**{"sectors": 0, "busy_ms": 0, **disk}))

    @property
    def here(self) -> Here:
        return Here(proc=self.proc, sys=self.sys, clock=lambda: self.now)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def after_a_second(node: Node, **said: int) -> dict[str, float]:
    collector = system.make(node.here)
    collector.sample()
    node.say(**said)
    node.now += 1.0
    return all_values(collector.sample())


def test_processors_are_percentages_of_what_passed(node: Node) -> None:
    found = after_a_second(node, busy=30, idle=70)
    assert found["system/cpu/percent"] == 30.0
    assert found["system/cpu/user_percent"] == 30.0
    assert found["system/cpu/max_core_percent"] == 100.0


def test_traffic_is_a_rate_and_errors_are_counted(node: Node) -> None:
    found = after_a_second(node, received=1000, sent=50)
    assert found["system/network/eth0/received_bytes_per_second"] == 1000.0
    assert found["system/network/eth0/sent_bytes_per_second"] == 50.0
    assert found["system/network/eth0/receive_errors_total"] == 1.0
    assert found["system/network/eth0/send_drops_total"] == 4.0


def test_interfaces_that_are_not_the_nodes_own_are_not_shown(node: Node) -> None:
    assert {key.split("/")[2] for key in after_a_second(node) if "/network/" in key} == {"eth0"}


def test_disks_are_whole_disks(node: Node) -> None:
    found = after_a_second(node, sectors=2, busy_ms=250)
    assert {key.split("/")[2] for key in found if "/disk/" in key} == {"vda"}
    assert found["system/disk/vda/read_bytes_per_second"] == 1024.0
    assert found["system/disk/vda/busy_percent"] == 25.0


def test_memory_and_load_are_as_they_stand(node: Node) -> None:
    found = all_values(system.make(node.here).sample())
    assert found["system/memory/used_bytes"] == 750 * 1024
    assert found["system/memory/used_percent"] == 75.0
    assert found["system/swap/used_bytes"] == 6 * 1024
    assert [found[f"system/load_{n}m"] for n in (1, 5, 15)] == [1.5, 2.5, 3.5]


def test_a_counter_that_begins_anew_is_no_rate(node: Node) -> None:
    collector = system.make(node.here)
    for received, now in ((1000, 0.0), (10, 1.0)):
        node.say(received=received)
        node.now = now
        found = all_values(collector.sample())
    assert "system/network/eth0/received_bytes_per_second" not in found


def test_file_systems_are_looked_at_every_ten_seconds(node: Node) -> None:
    collector = system.make(node.here)
    looks = []
    for second in range(12):
        node.now = float(second)
        keys = all_values(collector.sample())
        looks.append("system/filesystem/root/used_percent" in keys)
    assert looks == [True] + 9 * [False] + [True, False]


def test_a_system_without_proc_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no figures of this system: .*No such file"):
        system.make(Here(proc=tmp_path))


def _whole(found: dict[str, float]) -> dict[str, float] | None:
    """Once a moment has passed, and there are rates."""
    return found if "system/cpu/percent" in found else None


def test_this_node_says_what_the_page_lists() -> None:
    collector = system.make(Here())
    found = wait_until(lambda: _whole(all_values(collector.sample())))
    patterns = [metric.pattern for metric in metrics_of("system")]
    assert {"system/cpu/percent", "system/memory/used_bytes", "system/load_1m"} <= found.keys()
    assert [key for key in found if not any(one.fullmatch(key) for one in patterns)] == []
