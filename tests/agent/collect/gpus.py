"""GPUs as NVML shows them, for tests: what real cards of these generations answer and do not."""

from __future__ import annotations

from typing import Any

from tests.fakes_nvml import ALL_LINKS, UINT, ULONG_LONG, FakeGpu, FakeInstance
from trackagent.agent.collect.contract import Incident, Sample
from trackagent.agent.collect.nvml import Nvml

UUID = "GPU-8f6d8c1e-0000-0000-0000-00000000000{}"


def answers() -> dict[str, Any]:
    return {
        "GetUtilizationRates": (87, 42),
        "GetEncoderUtilization": (3, 167000),
        "GetDecoderUtilization": (0, 167000),
        "GetPowerUsage": 431_500,
        "GetEnforcedPowerLimit": 700_000,
        "GetTemperature": {0: 61},
        "GetClockInfo": {1: 1755, 2: 2619},
        "GetCurrentClocksEventReasons": 0x4 | 0x20,
        "GetCurrPcieLinkGeneration": 5,
        "GetCurrPcieLinkWidth": 16,
        "NvLinkStates": [1, 1, 1, 0],
    }


def fields() -> dict[Any, tuple[int, float]]:
    found: dict[Any, tuple[int, float]] = {
        "MEMORY_TEMP": (UINT, 72),
        "TOTAL_ENERGY_CONSUMPTION": (ULONG_LONG, 5_000_000),
        "ECC_SBE_VOL_TOTAL": (ULONG_LONG, 4),
        "ECC_DBE_VOL_TOTAL": (ULONG_LONG, 1),
        "ECC_SBE_AGG_TOTAL": (ULONG_LONG, 9),
        "ECC_DBE_AGG_TOTAL": (ULONG_LONG, 2),
        "REMAPPED_COR": (UINT, 0),
        "REMAPPED_UNC": (UINT, 2),
        "REMAPPED_PENDING": (UINT, 1),
        "REMAPPED_FAILURE": (UINT, 0),
        "PCIE_REPLAY_COUNTER": (UINT, 6),
        "NVLINK_LINK_COUNT": (UINT, 4),
    }
    for policy in ("POWER", "THERMAL", "SYNC_BOOST", "BOARD_LIMIT", "RELIABILITY"):
        found[f"PERF_POLICY_{policy}"] = (ULONG_LONG, 0)
    return found


def hopper(number: int = 0, **changed: Any) -> FakeGpu:
    """An H100: GPM, errors of NVLink link by link, no fan, no retired pages."""
    known = fields()
    for link in range(4):
        known["NVLINK_ERROR_DL_CRC", link] = (UINT, link)
        known["NVLINK_ERROR_DL_REPLAY", link] = (UINT, 0)
        known["NVLINK_ERROR_DL_RECOVERY", link] = (UINT, 1)
    # Link 0 is asked of with the scope 0, as a field of the device.
    for name in ("NVLINK_ERROR_DL_CRC", "NVLINK_ERROR_DL_REPLAY", "NVLINK_ERROR_DL_RECOVERY"):
        known[name] = known.pop((name, 0))
    gpm = {
        "SM_UTIL": 71.5,
        "SM_OCCUPANCY": 33.25,
        "ANY_TENSOR_UTIL": 48.0,
        "FP16_UTIL": 1.0,
        "FP32_UTIL": 2.0,
        "FP64_UTIL": 0.0,
        "DRAM_BW_UTIL": 55.0,
        "PCIE_TX_PER_SEC": 2.0,
        "PCIE_RX_PER_SEC": 3.0,
        "NVLINK_TOTAL_TX_PER_SEC": 100.0,
        "NVLINK_TOTAL_RX_PER_SEC": 200.0,
    }
    made: dict[str, Any] = {
        "uuid": UUID.format(number),
        "answers": answers(),
        "fields": known,
        "gpm": gpm,
        "processes": {4242: 60 << 30},
    }
    return FakeGpu(**(made | changed))


def ampere(number: int = 0, **changed: Any) -> FakeGpu:
    """An A100: no GPM, errors of NVLink as sums, rates by counters."""
    known = fields() | {
        "NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL": (ULONG_LONG, 3),
        "NVLINK_CRC_DATA_ERROR_COUNT_TOTAL": (ULONG_LONG, 4),
        "NVLINK_REPLAY_ERROR_COUNT_TOTAL": (ULONG_LONG, 5),
        "NVLINK_RECOVERY_ERROR_COUNT_TOTAL": (ULONG_LONG, 6),
        "NVLINK_ECC_DATA_ERROR_COUNT_TOTAL": (ULONG_LONG, 7),
        ("NVLINK_THROUGHPUT_DATA_TX", ALL_LINKS): (ULONG_LONG, 1000),
        ("NVLINK_THROUGHPUT_DATA_RX", ALL_LINKS): (ULONG_LONG, 3000),
    }
    made: dict[str, Any] = {
        "uuid": UUID.format(number),
        "name": "NVIDIA A100-SXM4-80GB",
        "answers": answers() | {"GetPcieThroughput": {0: 1500, 1: 2500}},
        "fields": known,
    }
    return FakeGpu(**(made | changed))


def workstation(number: int = 0) -> FakeGpu:
    """A card with a fan, without ECC and NVLink, whose driver has the older names."""
    known = answers() | {"GetFanSpeed": 35, "GetPcieThroughput": {0: 1500, 1: 2500}}
    known["GetCurrentClocksThrottleReasons"] = known.pop("GetCurrentClocksEventReasons")
    return FakeGpu(
        uuid=UUID.format(number),
        name="NVIDIA TITAN V",
        answers=known,
        fields={
            "RETIRED_SBE": (ULONG_LONG, 1),
            "RETIRED_DBE": (ULONG_LONG, 0),
            "RETIRED_PENDING": (ULONG_LONG, 0),
        },
    )


def blackwell(number: int = 0) -> FakeGpu:
    gpu = hopper(number, name="NVIDIA B200")
    for name in list(gpu.fields):
        if "NVLINK_ERROR_DL" in str(name):
            del gpu.fields[name]
    for link in range(4):
        where: Any = ("NVLINK_COUNT_RCV_ERRORS", link) if link else "NVLINK_COUNT_RCV_ERRORS"
        gpu.fields[where] = (ULONG_LONG, 2)
    return gpu


def instance(number: int = 0, **changed: Any) -> FakeInstance:
    made: dict[str, Any] = {
        "uuid": f"MIG-{number}",
        "name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "number": 7 + number,
        "gpm": {"SM_UTIL": 12.5},
        "processes": {77: None},
    }
    return FakeInstance(**(made | changed))


class Clock:
    """Seconds that a test moves; the driver's own move with them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A collector over a fake library: what it gave last, by key, and all that it told."""

    def __init__(self, library: Any) -> None:
        self.driver = library.nvmlLib
        self.clock = Clock()
        self.collector = Nvml(library=library, clock=self.clock)
        self.incidents: list[Incident] = []

    def sample(self, after_s: float = 1.0) -> dict[str, float]:
        self.clock.now += after_s
        self.driver.now_micros += int(after_s * 1e6)
        found: dict[str, float] = {}
        for one in self.collector.sample():
            if isinstance(one, Incident):
                self.incidents.append(one)
            else:
                assert isinstance(one, Sample)
                assert all(key.startswith(f"gpu/{one.gpu}/") for key in one.values)
                assert not found.keys() & one.values.keys()
                found |= one.values
        return found
