"""The collector of NVIDIA GPUs, over a fake driver: what it reads of whole and partitioned cards of several
generations, and what it does where a card or the driver fails."""

from __future__ import annotations

import re
from typing import Any

import pynvml
import pytest

from tests.agent.collect.gpus import (
    UUID,
    Watched,
    ampere,
    blackwell,
    hopper,
    instance,
    workstation,
)
from tests.fakes_nvml import (
    GPU_IS_LOST,
    NO_INSTANCE,
    NO_PERMISSION,
    UINT,
    ULONG_LONG,
    UNKNOWN,
    FakeGpu,
    fake_nvml,
)
from trackagent.agent.collect.contract import Unavailable
from trackagent.agent.collect.gpu import METRICS
from trackagent.agent.collect.nvml import Nvml
from trackagent.agent.collect.nvml_device import THROTTLE_REASONS
from trackagent.agent.collect.nvml_events import MAX_AT_ONCE

# Without these there is no GPU, or no driver.
NEEDED = {
    "nvmlInitWithFlags",
    "nvmlSystemGetDriverVersion",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetName",
}


def watched(*gpus: FakeGpu, **driver: Any) -> Watched:
    return Watched(fake_nvml(list(gpus), **driver))


def picked(found: dict[str, float], *keys: str, gpu: str = "0") -> list[float | None]:
    return [found.get(f"gpu/{gpu}/{key}") for key in keys]


def test_what_a_card_says_in_the_units_of_the_keys() -> None:
    found = watched(hopper()).sample()
    assert picked(found, "utilization_percent", "memory_utilization_percent") == [87.0, 42.0]
    assert picked(found, "encoder_percent", "decoder_percent") == [3.0, 0.0]
    assert picked(found, "power_watts", "power_limit_watts") == [431.5, 700.0]
    assert picked(found, "temperature_celsius", "memory_temperature_celsius") == [61.0, 72.0]
    assert picked(found, "sm_clock_mhz", "memory_clock_mhz") == [1755.0, 2619.0]
    assert picked(found, "energy_joules_total") == [5000.0]
    assert picked(found, "pcie_generation", "pcie_width_lanes") == [5.0, 16.0]
    assert picked(found, "pcie_replays_total") == [6.0]


def test_memory_that_the_driver_keeps_is_apart() -> None:
    found = watched(hopper()).sample()
    keys = [f"memory_{part}_bytes" for part in ("total", "reserved", "free", "used")]
    assert picked(found, *keys) == [80.0 * 2**30, 0.5 * 2**30, 60.0 * 2**30, 20.0 * 2**30]
    assert picked(found, "memory_used_percent") == [25.0]


def test_an_older_driver_counts_it_as_used() -> None:
    found = watched(hopper(), missing=frozenset({"nvmlDeviceGetMemoryInfo_v2"})).sample()
    assert picked(found, "memory_reserved_bytes", "memory_used_bytes") == [None, 20.5 * 2**30]


def test_reasons_of_throttling_are_named() -> None:
    found = watched(hopper()).sample()
    active = [name for name in THROTTLE_REASONS if found[f"gpu/0/throttle/{name}"]]
    assert active == ["sw_power_cap", "sw_thermal"]


def test_the_bits_of_the_reasons_are_nvmls() -> None:
    theirs = {
        "idle": "GpuIdle",
        "applications_clocks": "ApplicationsClocksSetting",
        "sw_power_cap": "SwPowerCap",
        "hw_slowdown": "HwSlowdown",
        "sync_boost": "SyncBoost",
        "sw_thermal": "SwThermalSlowdown",
        "hw_thermal": "HwThermalSlowdown",
        "hw_power_brake": "HwPowerBrakeSlowdown",
        "display_clocks": "DisplayClockSetting",
    }
    bits = {ours: getattr(pynvml, f"nvmlClocksEventReason{name}") for ours, name in theirs.items()}
    assert bits == THROTTLE_REASONS


def test_energy_and_violations_are_rates_since_the_last_sample() -> None:
    gpu = hopper()
    nodes = watched(gpu)
    assert picked(nodes.sample(), "power_mean_watts", "throttled/power_percent") == [None, None]
    gpu.fields["TOTAL_ENERGY_CONSUMPTION"] = (ULONG_LONG, 5_000_000 + 1_200_000)
    gpu.fields["PERF_POLICY_POWER"] = (ULONG_LONG, 500_000_000)
    found = nodes.sample(after_s=2.0)
    assert picked(found, "power_mean_watts", "throttled/power_percent") == [600.0, 25.0]


def test_a_counter_that_begins_anew_is_no_rate() -> None:
    gpu = hopper()
    nodes = watched(gpu)
    nodes.sample()
    gpu.fields["TOTAL_ENERGY_CONSUMPTION"] = (ULONG_LONG, 1_000)
    assert picked(nodes.sample(), "power_mean_watts") == [None]
    gpu.fields["TOTAL_ENERGY_CONSUMPTION"] = (ULONG_LONG, 301_000)
    assert picked(nodes.sample(), "power_mean_watts") == [300.0]


def test_a_counter_that_the_driver_has_not_read_anew_is_no_rate() -> None:
    gpu = hopper()
    nodes = watched(gpu)
    nodes.sample()
    nodes.driver.now_micros -= 1_000_000
    assert picked(nodes.sample(), "power_mean_watts") == [None]


def test_hopper_says_what_its_units_did_between_two_samples() -> None:
    nodes = watched(hopper())
    keys = ("sm_active_percent", "tensor_active_percent", "dram_active_percent")
    assert picked(nodes.sample(), *keys) == [None, None, None]
    found = nodes.sample()
    assert picked(found, *keys) == [71.5, 48.0, 55.0]
    assert picked(found, "sm_occupancy_percent") == [33.25]
    rates = ("nvlink_sent_bytes_per_second", "pcie_received_bytes_per_second")
    assert picked(found, *rates) == [100.0 * 2**20, 3.0 * 2**20]


def test_what_the_counters_cannot_say_is_left_out() -> None:
    gpu = hopper(gpm={"SM_UTIL": float("nan"), "DRAM_BW_UTIL": 1.0})
    nodes = watched(gpu)
    nodes.sample()
    found = nodes.sample()
    assert picked(found, "sm_active_percent", "dram_active_percent") == [None, 1.0]


def test_nvlink_of_ampere_is_a_rate_of_counters() -> None:
    gpu = ampere()
    nodes = watched(gpu)
    nodes.sample()
    where: Any = next(name for name in gpu.fields if "DATA_TX" in str(name))
    gpu.fields[where] = (ULONG_LONG, 1000 + 4096)
    found = nodes.sample(after_s=2.0)
    rates = ("nvlink_sent_bytes_per_second", "nvlink_received_bytes_per_second")
    assert picked(found, *rates) == [2048.0 * 1024, 0.0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [(ampere, [7.0, 5.0, 6.0, 7.0, None]), (hopper, [6.0, 0.0, 4.0, None, None])],
)
def test_errors_of_nvlink_are_sums_over_the_links(make: Any, expected: list[float | None]) -> None:
    kinds = ("crc", "replay", "recovery", "ecc", "receive")
    found = watched(make()).sample()
    assert picked(found, *(f"nvlink_{kind}_errors_total" for kind in kinds)) == expected
    assert picked(found, "nvlink_links_up") == [3.0]


def test_blackwell_counts_other_errors_of_nvlink() -> None:
    found = watched(blackwell()).sample()
    assert picked(found, "nvlink_receive_errors_total", "nvlink_crc_errors_total") == [8.0, None]


def test_ecc_and_remapped_rows_are_read_every_ten_seconds() -> None:
    gpu = hopper()
    nodes = watched(gpu)
    keys = ("ecc_corrected_errors_total", "ecc_uncorrected_errors_total", "remapped_rows_pending")
    assert picked(nodes.sample(), *keys) == [4.0, 1.0, 1.0]
    gpu.fields["ECC_DBE_VOL_TOTAL"] = (ULONG_LONG, 2)
    assert picked(nodes.sample(9.0), *keys) == [None, None, None]
    assert picked(nodes.sample(1.0), *keys) == [4.0, 2.0, 1.0]


def test_pcie_without_counters_is_watched_every_ten_seconds() -> None:
    nodes = watched(ampere())
    assert picked(nodes.sample(), "pcie_sent_bytes_per_second") == [1_500_000.0]
    assert picked(nodes.sample(), "pcie_sent_bytes_per_second") == [None]
    assert nodes.driver.count("nvmlDeviceGetPcieThroughput") == 2


def test_a_card_that_counts_pcie_itself_is_not_watched() -> None:
    nodes = watched(hopper())
    nodes.sample()
    assert picked(nodes.sample(), "pcie_sent_bytes_per_second") == [2.0 * 2**20]
    assert nodes.driver.count("nvmlDeviceGetPcieThroughput") == 0


def test_a_driver_that_gives_no_fields_is_asked_once() -> None:
    nodes = watched(ampere(fails={"GetFieldValues": NO_PERMISSION}))
    nodes.sample()
    asked = nodes.driver.count("nvmlDeviceGetFieldValues")
    nodes.sample(10.0)
    # Without its own counters of PCIe, the set of fields that is asked every time is another one.
    assert nodes.driver.count("nvmlDeviceGetFieldValues") == asked + 1
    nodes.sample(10.0)
    assert nodes.driver.count("nvmlDeviceGetFieldValues") == asked + 1


def test_pcie_counters_of_64_bits_are_rates_and_others_are_not_used() -> None:
    wide, narrow = ampere(0), ampere(1)
    for gpu, kind in ((wide, ULONG_LONG), (narrow, UINT)):
        gpu.fields["PCIE_COUNT_TX_BYTES"] = gpu.fields["PCIE_COUNT_RX_BYTES"] = (kind, 1000)
    nodes = watched(wide, narrow)
    nodes.sample()
    wide.fields["PCIE_COUNT_TX_BYTES"] = (ULONG_LONG, 5000)
    found = nodes.sample()
    assert picked(found, "pcie_sent_bytes_per_second") == [4000.0]
    assert picked(found, "pcie_sent_bytes_per_second", gpu="1") == [None]


def test_what_a_card_does_not_support_is_asked_once() -> None:
    nodes = watched(FakeGpu(uuid=UUID.format(0)))
    first = nodes.sample()
    assert set(first) == {
        *(f"gpu/0/memory_{part}_bytes" for part in ("total", "reserved", "free", "used")),
        "gpu/0/memory_used_percent",
        "gpu/0/processes",
    }
    nodes.driver.calls.clear()
    nodes.sample()
    assert [name for name, *_ in nodes.driver.calls] == [
        "nvmlEventSetWait_v2",
        "nvmlDeviceGetMemoryInfo_v2",
    ]


def test_what_fails_for_a_moment_is_asked_again() -> None:
    gpu = hopper(fails={"GetPowerUsage": UNKNOWN})
    nodes = watched(gpu)
    assert picked(nodes.sample(), "power_watts", "temperature_celsius") == [None, 61.0]
    gpu.fails.clear()
    assert picked(nodes.sample(), "power_watts") == [431.5]


# Of functions that are asked of a device: no such function, not supported, no permission, a timeout, no data.
@pytest.mark.parametrize("code", [UNKNOWN, 13, 3, 4, 10, 21])
def test_whatever_one_function_fails_with_the_other_readings_stay(code: int) -> None:
    asked = watched(hopper(mig=[instance()]))
    whole = {*asked.sample(), *asked.sample()}
    names = {name for name, *_ in asked.driver.calls}
    silent = set()
    for name in sorted(names - NEEDED):
        gpu = hopper(mig=[instance()], fails={re.sub("^nvml(Device)?|_v[0-9]$", "", name): code})
        nodes = watched(gpu)
        nodes.driver.fails[name] = code
        found = {*nodes.sample(), *nodes.sample()}
        assert found <= whole, name
        assert len(found) > len(whole) / 2, name
        assert [one.message for one in nodes.incidents] == [], name
        silent |= {name} if found < whole else set()
    assert silent >= {
        "nvmlDeviceGetUtilizationRates",
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetMigMode",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlGpmSampleGet",
        "nvmlGpmMetricsGet",
    }


def test_older_bindings_lack_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_nvml([hopper()])
    nodes = Watched(library)
    with monkeypatch.context() as older:
        older.delattr(library, "nvmlDeviceGetClockInfo")
        assert picked(nodes.sample(), "sm_clock_mhz", "power_watts") == [None, 431.5]
    assert picked(nodes.sample(), "sm_clock_mhz") == [None]  # it is not looked for again


def test_older_bindings_lack_gpm(monkeypatch: pytest.MonkeyPatch) -> None:
    library = fake_nvml([hopper()])
    monkeypatch.delattr(library, "nvmlGpmQueryDeviceSupport")
    nodes = Watched(library)
    nodes.sample()
    assert picked(nodes.sample(), "sm_active_percent", "power_watts") == [None, 431.5]


def test_counters_that_may_not_be_read_are_asked_once_and_given_back() -> None:
    gpu = hopper()
    nodes = watched(gpu)
    nodes.sample()
    gpu.fails["GpmSampleGet"] = NO_PERMISSION
    nodes.sample()
    gpu.fails.clear()
    nodes.sample()
    assert picked(nodes.sample(), "sm_active_percent") == [None]
    assert nodes.driver.samples == 0


def test_one_call_gives_all_fields() -> None:
    nodes = watched(hopper())
    nodes.sample()
    nodes.driver.calls.clear()
    nodes.sample()
    assert nodes.driver.count("nvmlDeviceGetFieldValues") == 1


def test_processes_are_listed_every_minute() -> None:
    nodes = watched(hopper())
    assert picked(nodes.sample(), "processes") == [1.0]
    assert nodes.collector.devices()[0].processes == {4242: 60 << 30}
    assert picked(nodes.sample(59.0), "processes") == [None]
    assert picked(nodes.sample(1.0), "processes") == [1.0]
    assert nodes.driver.count("nvmlDeviceGetComputeRunningProcesses_v3") == 4


def test_an_older_driver_lists_processes_by_an_older_function() -> None:
    nodes = watched(hopper(), missing=frozenset({"nvmlDeviceGetComputeRunningProcesses_v3"}))
    assert picked(nodes.sample(), "processes") == [1.0]


def test_who_the_cards_are() -> None:
    nodes = watched(hopper(0), ampere(1))
    known = [(one.gpu, one.uuid, one.name, one.driver) for one in nodes.collector.devices()]
    assert known == [
        ("0", UUID.format(0), "NVIDIA H100 80GB HBM3", "550.54.15"),
        ("1", UUID.format(1), "NVIDIA A100-SXM4-80GB", "550.54.15"),
    ]


def test_an_instance_has_its_own_memory_and_counters() -> None:
    gpu = hopper(mig=[instance(0), instance(1)], answers={"GetPowerUsage": 300_000}, gpm={})
    nodes = watched(gpu)
    nodes.sample()
    found = nodes.sample()
    assert picked(found, "power_watts", "utilization_percent") == [300.0, None]
    one = picked(found, "memory_used_bytes", "sm_active_percent", "power_watts", gpu="0.1")
    assert one == [1.0 * 2**30, 12.5, None]
    known = [(one.gpu, one.uuid, one.mig_profile) for one in nodes.collector.devices()]
    assert known == [
        ("0", gpu.uuid, ""),
        ("0.0", "MIG-0", "1g.10gb"),
        ("0.1", "MIG-1", "1g.10gb"),
    ]


def test_a_card_may_be_partitioned_anew() -> None:
    gpu = hopper(mig=[instance(0), instance(1)])
    nodes = watched(gpu)
    nodes.sample()
    gpu.mig = [instance(2)]
    nodes.sample(10.0)
    assert [one.uuid for one in nodes.collector.devices()] == [gpu.uuid, "MIG-2"]
    nodes.collector.close()
    assert nodes.driver.samples == 0


def test_an_instance_that_goes_while_it_is_looked_for_is_left_out() -> None:
    gpu = hopper(mig=[instance(0)])
    nodes = watched(gpu)
    gpu.fails["GetName"] = UNKNOWN
    found = nodes.sample()
    assert {key.split("/")[1] for key in found} == {"0"}
    gpu.fails.clear()
    assert {key.split("/")[1] for key in nodes.sample(10.0)} == {"0", "0.0"}


def test_a_storm_of_xids_is_told_bit_by_bit() -> None:
    gpu = hopper()
    nodes = watched(gpu)
    nodes.driver.events = [(gpu, 31, NO_INSTANCE)] * 40
    nodes.sample()
    assert len(nodes.incidents) == MAX_AT_ONCE
    nodes.sample()
    assert len(nodes.incidents) == 40


def test_a_card_without_events_has_readings() -> None:
    gpu = hopper()
    gpu.answers["EventTypes"] = 0
    nodes = watched(gpu)
    nodes.driver.events = [(gpu, 31, NO_INSTANCE)]
    assert picked(nodes.sample(), "power_watts") == [431.5]
    assert nodes.incidents == []


def test_an_xid_is_an_incident_of_its_card() -> None:
    gpus = [hopper(0), hopper(1)]
    nodes = watched(*gpus)
    nodes.sample()
    nodes.driver.events = [
        (gpus[1], 48, NO_INSTANCE),
        (gpus[0], 31, 2),
        (gpus[0], 9999, NO_INSTANCE),
    ]
    nodes.sample()
    told = [(one.level, one.message) for one in nodes.incidents]
    assert told == [
        ("error", "GPU 1: XID 48, double bit ECC error"),
        ("warning", "GPU 0, instance 2: XID 31, GPU memory page fault"),
        ("error", "GPU 0: XID 9999"),
    ]
    assert nodes.incidents[0].data == {"gpu": "1", "uuid": UUID.format(1), "xid": 48}
    assert nodes.incidents[1].data["gpu_instance"] == 2


def test_a_lost_card_is_told_of_once_and_the_others_go_on() -> None:
    gpus = [hopper(0), hopper(1)]
    nodes = watched(*gpus)
    nodes.sample()
    gpus[0].fails[""] = GPU_IS_LOST
    for _ in range(3):
        found = nodes.sample(61.0)
        assert picked(found, "power_watts") == [None]
        assert picked(found, "power_watts", gpu="1") == [431.5]
    told = [(one.level, one.message) for one in nodes.incidents]
    name = f"GPU 0 (NVIDIA H100 80GB HBM3, {UUID.format(0)})"
    assert told == [("error", f"{name} does not answer any more: GPU is lost")]
    assert nodes.incidents[0].data["uuid"] == UUID.format(0)
    assert [one.lost for one in nodes.collector.devices()] == ["GPU is lost", ""]


def test_a_lost_card_is_tried_again_every_minute() -> None:
    gpus = [hopper(0), hopper(1)]
    nodes = watched(*gpus)
    gpus[0].fails[""] = GPU_IS_LOST
    nodes.sample()
    gpus[0].fails.clear()
    assert picked(nodes.sample(59.0), "power_watts") == [None]
    assert picked(nodes.sample(1.0), "power_watts") == [431.5]
    assert [one.level for one in nodes.incidents] == ["error", "info"]
    assert [one.lost for one in nodes.collector.devices()] == ["", ""]


def test_a_card_that_is_lost_at_the_start_holds_no_other_up() -> None:
    nodes = watched(hopper(0, fails={"": GPU_IS_LOST}), hopper(1))
    assert picked(nodes.sample(), "power_watts", gpu="1") == [431.5]
    assert [one.message for one in nodes.incidents] == [
        "GPU 0 does not answer any more: GPU is lost"
    ]


def test_a_card_that_may_not_be_used_is_told_of() -> None:
    nodes = watched(hopper(0, fails={"GetHandleByIndex": NO_PERMISSION}), hopper(1))
    nodes.sample()
    assert [one.message for one in nodes.incidents] == [
        "GPU 0 does not answer any more: Insufficient Permissions"
    ]


def test_when_all_are_lost_the_driver_is_begun_anew() -> None:
    gpu = hopper()
    nodes = watched(gpu)
    nodes.sample()
    gpu.fails[""] = GPU_IS_LOST
    nodes.sample()
    for _ in range(2):
        with pytest.raises(OSError, match="no NVIDIA GPU answers: GPU is lost"):
            nodes.sample()
    assert (nodes.driver.initialized, nodes.driver.event_sets, nodes.driver.samples) == (0, 0, 0)
    gpu.fails.clear()
    assert picked(nodes.sample(), "power_watts") == [431.5]
    assert [one.level for one in nodes.incidents] == ["error", "info"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (12, "there is no NVIDIA driver here (no libnvidia-ml.so.1)"),
        (9, "the NVIDIA driver is not loaded"),
        (18, "of different versions, as after an update: restart the node"),
        (4, "NVML cannot be used: Insufficient Permissions"),
    ],
)
def test_without_a_driver_one_line_says_so(code: int, reason: str) -> None:
    with pytest.raises(Unavailable) as raised:
        watched(hopper(), init=code)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_driver_that_is_too_old_is_unavailable() -> None:
    with pytest.raises(Unavailable, match="too old"):
        watched(hopper(), missing=frozenset({"nvmlInitWithFlags"}))


def test_a_driver_without_cards_is_unavailable_and_given_back() -> None:
    library = fake_nvml([])
    with pytest.raises(Unavailable, match="shows none here"):
        Nvml(library=library)
    assert library.nvmlLib.initialized == 0


def test_an_old_driver_gives_what_it_has() -> None:
    newer = {
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetMigMode",
        "nvmlGpmQueryDeviceSupport",
        "nvmlEventSetCreate",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetGraphicsRunningProcesses_v3",
    }
    found = watched(workstation(), missing=frozenset(newer)).sample()
    assert picked(found, "power_watts", "fan_percent") == [431.5, 35.0]
    assert picked(found, "throttle/sw_power_cap") == [1.0]


def test_the_table_lists_what_is_sampled_and_nothing_else() -> None:
    gpus = [hopper(0), ampere(1), workstation(2), blackwell(3), hopper(4, mig=[instance()])]
    nodes = watched(*gpus)
    keys = set(nodes.sample())
    for gpu in gpus:
        gpu.fields |= {n: (k, v + 1) for n, (k, v) in gpu.fields.items() if k == ULONG_LONG}
    keys |= set(nodes.sample())
    unlisted = [key for key in keys if not any(one.pattern.fullmatch(key) for one in METRICS)]
    assert unlisted == []
    ours = [one for one in METRICS if not one.source.startswith("AMD: ")]
    assert [one.key for one in ours if not any(map(one.pattern.fullmatch, keys))] == []
