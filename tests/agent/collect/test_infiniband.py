"""The ports of InfiniBand adapters, from files of our own in the shape of the kernel's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.agent.collect.sampled import all_values
from trackagent.agent.collect import infiniband
from trackagent.agent.collect.contract import Here, Unavailable
from trackagent.agent.collect.metrics import metrics_of

PREFIX = "infiniband/mlx5_0/1/"


class Adapter:
    """Port 1 of mlx5_0 under a /sys of our own, and a clock."""

    def __init__(self, root: Path) -> None:
        self.sys, self.now = root, 0.0
        self.port = root / "class" / "infiniband" / "mlx5_0" / "ports" / "1"
        (self.port / "counters").mkdir(parents=True)
        (self.port / "hw_counters").mkdir()
        self.say(state="4: ACTIVE")
        self.say("counters", port_rcv_data="1000", port_xmit_data="0", link_downed="2")
        self.say("counters", port_rcv_packets="7", port_xmit_packets="0", symbol_error="0")
        self.say("hw_counters", out_of_sequence="5")

    def say(self, folder: str = "", **files: str) -> None:
        for name, text in files.items():
            (self.port / folder / name).write_text(f"{text}\n")

    @property
    def here(self) -> Here:
        return Here(sys=self.sys, clock=lambda: self.now)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return Adapter(tmp_path)


def test_data_is_counted_in_words_of_four_bytes(adapter: Adapter) -> None:
    collector = infiniband.make(adapter.here)
    collector.sample()
    adapter.say("counters", port_rcv_data="3500")
    adapter.now += 2.0
    found = all_values(collector.sample())
    assert found[f"{PREFIX}received_bytes_per_second"] == 5000.0
    assert found[f"{PREFIX}sent_bytes_per_second"] == 0.0


def test_the_state_is_the_kernels_number(adapter: Adapter) -> None:
    assert all_values(infiniband.make(adapter.here).sample())[f"{PREFIX}state"] == 4.0


def test_a_port_that_goes_down_says_so_in_the_next_sample(adapter: Adapter) -> None:
    collector = infiniband.make(adapter.here)
    collector.sample()
    adapter.say(state="1: DOWN")
    adapter.now += 1.0
    assert all_values(collector.sample())[f"{PREFIX}state"] == 1.0


def test_errors_are_counted_every_ten_seconds(adapter: Adapter) -> None:
    collector = infiniband.make(adapter.here)
    seen = []
    for second in range(12):
        adapter.now = float(second)
        seen.append(all_values(collector.sample()).get(f"{PREFIX}link_downed_total"))
    assert seen == [2.0] + 9 * [None] + [2.0, None]


def test_what_an_adapter_does_not_count_is_left_out(adapter: Adapter) -> None:
    found = all_values(infiniband.make(adapter.here).sample())
    assert found[f"{PREFIX}out_of_sequence_total"] == 5.0
    assert f"{PREFIX}ack_timeouts_total" not in found


def test_every_key_is_on_the_page(adapter: Adapter) -> None:
    collector = infiniband.make(adapter.here)
    found = all_values(collector.sample())
    adapter.now += 1.0
    found |= all_values(collector.sample())
    patterns = [metric.pattern for metric in metrics_of("infiniband")]
    assert [key for key in found if not any(one.fullmatch(key) for one in patterns)] == []


def test_an_adapter_that_is_taken_away_is_no_failure(adapter: Adapter) -> None:
    collector = infiniband.make(adapter.here)
    collector.sample()
    shutil.rmtree(adapter.port)
    assert all_values(collector.sample()) == {}


def test_a_node_without_adapters_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no InfiniBand or RoCE adapter"):
        infiniband.make(Here(sys=tmp_path))
