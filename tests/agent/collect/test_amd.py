"""The collector of AMD's GPUs, over a made-up library; and which library a node's GPUs are read by."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.agent.collect.gpus import Clock
from tests.fakes_amdsmi import (
    API_FAILED,
    DRIVER_NOT_LOADED,
    NO_PERM,
    NOT_INIT,
    FakeAmdSmi,
    instinct,
    radeon,
)
from trackagent.agent.collect import gpu
from trackagent.agent.collect.amd import Amd
from trackagent.agent.collect.contract import Here, Incident, Sample, Unavailable
from trackagent.agent.collect.gpu import METRICS, OF_AMD


class Watched:
    """A collector over a fake library: what it gave last, by key, and all that it told."""

    def __init__(self, *cards: dict[str, Any]) -> None:
        self.library = FakeAmdSmi(list(cards))
        self.clock = Clock()
        self.collector = Amd(library=self.library, clock=self.clock)
        self.incidents: list[Incident] = []

    def sample(self, after_s: float = 1.0) -> dict[str, float]:
        self.clock.now += after_s
        found: dict[str, float] = {}
        for one in self.collector.sample():
            if isinstance(one, Incident):
                self.incidents.append(one)
            else:
                assert isinstance(one, Sample)
                assert all(key.startswith(f"gpu/{one.gpu}/") for key in one.values)
                found |= one.values
        return found


def picked(found: dict[str, float], *keys: str, gpu: str = "0") -> list[float | None]:
    return [found.get(f"gpu/{gpu}/{key}") for key in keys]


def test_what_a_card_says_in_the_units_of_the_keys() -> None:
    found = Watched(instinct()).sample()
    assert picked(found, "utilization_percent", "memory_utilization_percent") == [93.0, 37.0]
    assert picked(found, "power_watts", "power_limit_watts") == [612.0, 750.0]
    memory = [f"memory_{part}_bytes" for part in ("total", "used", "free")]
    assert picked(found, *memory) == [192.0 * 2**30, 48.0 * 2**30, 144.0 * 2**30]
    assert picked(found, "memory_used_percent") == [25.0]
    assert picked(found, "temperature_celsius", "memory_temperature_celsius") == [71.0, 64.0]
    assert picked(found, "sm_clock_mhz", "memory_clock_mhz") == [2100.0, 1300.0]
    assert picked(found, "pcie_generation", "pcie_width_lanes") == [5.0, 16.0]
    assert picked(found, "ecc_corrected_errors_total", "retired_pages") == [5.0, 0.0]
    assert picked(found, "throttled/power_percent", "throttled/thermal_percent") == [25.0, 12.0]
    assert picked(found, "energy_joules_total", "decoder_percent") == [16.0, None]


def test_an_older_card_has_other_sensors() -> None:
    found = Watched(radeon()).sample()
    assert picked(found, "temperature_celsius", "power_watts", "fan_percent") == [54.0, 180.0, 20.0]
    assert picked(found, "throttled/power_percent", "decoder_percent") == [None, 50.0]


def test_mean_power_follows_from_the_counter_of_energy() -> None:
    card = instinct()
    node = Watched(card)
    assert picked(node.sample(), "power_mean_watts") == [None]
    resolution = 16.0
    card["energy_count"] = {
        "energy_accumulator": 1_000_000 + 1_200 * 1e6 / resolution,
        "counter_resolution": resolution,
        "timestamp": 7_000_000_000,
    }
    assert picked(node.sample(), "power_mean_watts") == [600.0]
    assert picked(node.sample(), "power_mean_watts") == [None]


def test_the_counter_had_another_name() -> None:
    card = instinct()
    card["energy_count"]["power"] = card["energy_count"].pop("energy_accumulator")
    assert picked(Watched(card).sample(), "energy_joules_total") == [16.0]


def test_what_a_card_does_not_support_is_asked_once() -> None:
    node = Watched({"gpu_memory_total": 1 << 30, "gpu_memory_usage": 0})
    node.sample()
    node.library.calls.clear()
    node.sample()
    assert node.library.calls == ["gpu_memory_total", "gpu_memory_usage"]


def test_an_older_library_lacks_functions() -> None:
    node = Watched(instinct())
    node.library.lacks = {"violation_status", "clock_info"}
    keys = ("throttled/power_percent", "sm_clock_mhz", "power_watts")
    assert picked(node.sample(), *keys) == [None, None, 612.0]
    node.library.lacks = set()
    assert picked(node.sample(10.0), *keys) == [None, None, 612.0]


def test_what_fails_for_a_moment_is_asked_again() -> None:
    node = Watched(instinct())
    node.library.fails = {"power_info": API_FAILED, "clock_info": NO_PERM}
    assert picked(node.sample(), "power_watts", "sm_clock_mhz") == [None, None]
    node.library.fails = {}
    assert picked(node.sample(), "power_watts", "sm_clock_mhz") == [612.0, None]


def test_limits_and_errors_are_read_every_ten_seconds_and_processes_every_minute() -> None:
    node = Watched(instinct())
    keys = ("power_limit_watts", "ecc_uncorrected_errors_total", "processes")
    assert picked(node.sample(), *keys) == [750.0, 1.0, 1.0]
    assert picked(node.sample(9.0), *keys) == [None, None, None]
    assert picked(node.sample(1.0), *keys) == [750.0, 1.0, None]
    assert picked(node.sample(50.0), "processes") == [1.0]
    assert node.collector.devices()[0].processes == {4242: 1 << 30}


def test_who_the_cards_are() -> None:
    [one] = Watched(instinct()).collector.devices()
    uuid = "c4ff74a1-0000-1000-80df-1a2b3c4d5e6f"
    assert (one.gpu, one.uuid, one.name, one.driver) == ("0", uuid, "AMD Instinct MI300X", "6.10.5")


def test_a_card_without_a_reading_is_told_of_once_and_the_others_go_on() -> None:
    node = Watched(instinct(), instinct())
    node.sample()
    node.library.fails = {"card 0": API_FAILED}
    for _ in range(2):
        found = node.sample(61.0)
        assert (picked(found, "power_watts"), picked(found, "power_watts", gpu="1")) == (
            [None],
            [612.0],
        )
    assert [one.level for one in node.incidents] == ["error"]
    assert "GPU 0 (AMD Instinct MI300X" in node.incidents[0].message
    assert [one.lost for one in node.collector.devices()] == ["it gives no reading", ""]
    node.library.fails = {}
    assert picked(node.sample(), "power_watts") == [612.0]
    assert [one.level for one in node.incidents] == ["error", "info"]


def test_a_driver_that_goes_is_a_failure_and_begun_anew() -> None:
    node = Watched(instinct())
    node.library.fails = {"gpu_activity": NOT_INIT}
    with pytest.raises(OSError, match="AMD's driver does not answer"):
        node.sample()
    assert node.library.initialized == 0
    node.library.fails = {}
    assert picked(node.sample(), "power_watts") == [612.0]


def test_without_a_driver_or_a_card_one_line_says_so() -> None:
    with pytest.raises(Unavailable, match="AMDSMI_STATUS_34"):
        Amd(library=FakeAmdSmi([instinct()], init=DRIVER_NOT_LOADED))
    library = FakeAmdSmi([])
    with pytest.raises(Unavailable, match="shows none here"):
        Amd(library=library)
    assert library.initialized == 0


def test_the_table_lists_what_is_sampled_and_nothing_else() -> None:
    card = radeon() | {"violation_status": instinct()["violation_status"]}
    card["temp_metric"] |= instinct()["temp_metric"]
    node = Watched(card)
    keys = set(node.sample())
    card["energy_count"] = card["energy_count"] | {"timestamp": 6_000_000_000}
    keys |= set(node.sample())
    assert keys == {f"gpu/0/{key}" for key in OF_AMD}
    listed = {one.key for one in METRICS}
    assert {f"gpu/{{gpu}}/{key}" for key in OF_AMD} <= listed


# --- which of them


@pytest.fixture
def no_nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot_load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu.ctypes, "CDLL", cannot_load)


def test_a_node_without_gpus_says_so_in_one_line(no_nvidia: None, tmp_path: Path) -> None:
    with pytest.raises(Unavailable) as raised:
        gpu.make(Here(sys=tmp_path))
    assert str(raised.value) == (
        "no readings of NVIDIA GPUs: there is no NVIDIA driver here (no libnvidia-ml.so.1); "
        "no readings of AMD GPUs: there is no AMD driver here (no amdgpu)"
    )


def test_amds_are_read_by_the_library_that_is_installed(
    no_nvidia: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module" / "amdgpu").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "amdsmi", FakeAmdSmi([instinct()]))  # type: ignore[arg-type]
    [one] = gpu.make(Here(sys=tmp_path)).devices()
    assert one.name == "AMD Instinct MI300X"


def test_without_it_the_line_says_what_to_install(
    no_nvidia: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module" / "amdgpu").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "amdsmi", None)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match="install the amdsmi that comes with ROCm"):
        gpu.make(Here(sys=tmp_path))
