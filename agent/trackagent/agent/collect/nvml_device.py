"""The readings of one NVIDIA GPU, or of one instance of a partitioned one (MIG): from NVML's answers to keys.

Two sets, so that each stays a set of the same keys: what moves from second to second, and what is read rarely
since it seldom changes or costs the driver milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trackagent.agent.collect.nvml_calls import NARROW, Calls, Field
from trackagent.agent.collect.nvml_gpm import Gpm

_MILLI = 1e-3
_ALL_LINKS = 0xFFFFFFFF  # as the scope of a field
_MAX_LINKS = 36
_GPU_SENSOR, _SM_CLOCK, _MEMORY_CLOCK = 0, 1, 2  # nvmlTemperatureSensors_t, nvmlClockType_t
_SENT, _RECEIVED = 0, 1  # nvmlPcieUtilCounter_t

# nvmlClocksEventReasons: why clocks are below their maximum, by bit.
THROTTLE_REASONS = {
    "idle": 0x1,
    "applications_clocks": 0x2,
    "sw_power_cap": 0x4,
    "hw_slowdown": 0x8,
    "sync_boost": 0x10,
    "sw_thermal": 0x20,
    "hw_thermal": 0x40,
    "hw_power_brake": 0x80,
    "display_clocks": 0x100,
}
# NVML_FI_DEV_PERF_POLICY_…: counters of nanoseconds in which this kept clocks down.
POLICIES = ("POWER", "THERMAL", "SYNC_BOOST", "BOARD_LIMIT", "RELIABILITY")

_POLICY_FIELDS = {policy: (f"PERF_POLICY_{policy}", 0) for policy in POLICIES}
_NVLINK_RATES = {
    "nvlink_sent_bytes_per_second": ("NVLINK_THROUGHPUT_DATA_TX", _ALL_LINKS),
    "nvlink_received_bytes_per_second": ("NVLINK_THROUGHPUT_DATA_RX", _ALL_LINKS),
}
_PCIE_RATES = {
    "pcie_sent_bytes_per_second": ("PCIE_COUNT_TX_BYTES", 0),
    "pcie_received_bytes_per_second": ("PCIE_COUNT_RX_BYTES", 0),
}
_RARE_FIELDS: dict[str, Field] = {
    "ecc_corrected_errors_total": ("ECC_SBE_VOL_TOTAL", 0),
    "ecc_uncorrected_errors_total": ("ECC_DBE_VOL_TOTAL", 0),
    "ecc_corrected_lifetime_errors_total": ("ECC_SBE_AGG_TOTAL", 0),
    "ecc_uncorrected_lifetime_errors_total": ("ECC_DBE_AGG_TOTAL", 0),
    "retired_pages_single_bit": ("RETIRED_SBE", 0),
    "retired_pages_double_bit": ("RETIRED_DBE", 0),
    "retired_pages_pending": ("RETIRED_PENDING", 0),
    "remapped_rows_corrected": ("REMAPPED_COR", 0),
    "remapped_rows_uncorrected": ("REMAPPED_UNC", 0),
    "remapped_rows_pending": ("REMAPPED_PENDING", 0),
    "remapped_rows_failed": ("REMAPPED_FAILURE", 0),
    "pcie_replays_total": ("PCIE_REPLAY_COUNTER", 0),
}
# Which fields count an error of NVLink, by generation: sums over the links up to Ampere, then link by link.
_LINK_ERRORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "nvlink_crc_errors_total": (
        ("NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL", "NVLINK_CRC_DATA_ERROR_COUNT_TOTAL"),
        ("NVLINK_ERROR_DL_CRC",),
    ),
    "nvlink_replay_errors_total": (
        ("NVLINK_REPLAY_ERROR_COUNT_TOTAL",),
        ("NVLINK_ERROR_DL_REPLAY",),
    ),
    "nvlink_recovery_errors_total": (
        ("NVLINK_RECOVERY_ERROR_COUNT_TOTAL",),
        ("NVLINK_ERROR_DL_RECOVERY", "NVLINK_COUNT_LINK_RECOVERY_EVENTS"),
    ),
    "nvlink_ecc_errors_total": (("NVLINK_ECC_DATA_ERROR_COUNT_TOTAL",), ()),
    "nvlink_receive_errors_total": ((), ("NVLINK_COUNT_RCV_ERRORS",)),
}


class Device:
    """One GPU. clock: seconds, for what NVML gives no time of.

    All methods raise nvml_calls.Lost where it does not answer any more.
    """

    def __init__(self, library: Any, handle: Any, clock: Callable[[], float]) -> None:
        self._calls = Calls(library, handle)
        self._clock = clock
        self._gpm = Gpm(library, handle)
        self._before: dict[str, tuple[float, float]] = {}
        # 32 bits of bytes go round in less than a second: then this is no counter to use.
        self._pcie_counts = not self._gpm.is_supported
        self._links = self._count_links()
        self._link_error_fields = tuple(
            (name, link)
            for sums, singles in _LINK_ERRORS.values()
            for names, links in ((sums, min(self._links, 1)), (singles, self._links))
            for name in names
            for link in range(links)
        )

    def close(self) -> None:
        self._gpm.close()

    def often(self) -> dict[str, float]:
        """What moves from second to second."""
        found: dict[str, float | None] = {}
        ask = self._calls.ask
        utilization = ask("GetUtilizationRates")
        if utilization is not None:
            found["utilization_percent"] = utilization.gpu
            found["memory_utilization_percent"] = utilization.memory
        encoder, decoder = ask("GetEncoderUtilization"), ask("GetDecoderUtilization")
        found["encoder_percent"] = encoder and encoder[0]
        found["decoder_percent"] = decoder and decoder[0]
        found.update(_memory(self._calls))
        found["power_watts"] = _times(_MILLI, ask("GetPowerUsage"))
        found["power_limit_watts"] = _times(_MILLI, ask("GetEnforcedPowerLimit"))
        found["temperature_celsius"] = ask("GetTemperature", _GPU_SENSOR)
        found["sm_clock_mhz"] = ask("GetClockInfo", _SM_CLOCK)
        found["memory_clock_mhz"] = ask("GetClockInfo", _MEMORY_CLOCK)
        found.update(self._throttling())
        found.update(self._counters())
        found.update(self._gpm.read())
        return _known(found)

    def _throttling(self) -> dict[str, float | None]:
        reasons = self._calls.ask("GetCurrentClocksEventReasons")
        if reasons is None:  # its name up to driver 530
            reasons = self._calls.ask("GetCurrentClocksThrottleReasons")
        if reasons is None:
            return {}
        return {
            f"throttle/{name}": float(reasons & bit > 0) for name, bit in THROTTLE_REASONS.items()
        }

    def _counters(self) -> dict[str, float | None]:
        wanted = [("MEMORY_TEMP", 0), ("TOTAL_ENERGY_CONSUMPTION", 0), *_POLICY_FIELDS.values()]
        if self._pcie_counts:
            wanted += _PCIE_RATES.values()
        if self._links and not self._gpm.is_supported:
            wanted += _NVLINK_RATES.values()
        fields = self._calls.fields(tuple(wanted))
        values = {name: value for (name, _), (_, value, _) in fields.items()}
        found: dict[str, float | None] = {"memory_temperature_celsius": values.get("MEMORY_TEMP")}
        rates = {name: self._rate(name, *reading[:2]) for (name, _), reading in fields.items()}
        found["energy_joules_total"] = _times(_MILLI, values.get("TOTAL_ENERGY_CONSUMPTION"))
        found["power_mean_watts"] = _times(_MILLI, rates.get("TOTAL_ENERGY_CONSUMPTION"))
        for policy, (name, _) in _POLICY_FIELDS.items():
            # Nanoseconds a second, in steps of a tenth: so now and then a little more than all of it.
            share = _times(1e-7, rates.get(name))
            found[f"throttled/{policy.lower()}_percent"] = share and min(share, 100.0)
        for key, (name, _) in _NVLINK_RATES.items():
            found[key] = _times(1024.0, rates.get(name))
        for key, field in _PCIE_RATES.items():
            if field in fields and fields[field][2] not in NARROW:
                found[key] = rates.get(field[0])
            else:
                self._pcie_counts = False
        return found

    def rarely(self) -> dict[str, float]:
        """What seldom changes, or costs the driver milliseconds."""
        ask = self._calls.ask
        fields = self._calls.fields((*_RARE_FIELDS.values(), *self._link_error_fields))
        found: dict[str, float | None] = {
            key: fields[field][1] for key, field in _RARE_FIELDS.items() if field in fields
        }
        for key, (sums, singles) in _LINK_ERRORS.items():
            by_link = [value for (name, _), (_, value, _) in fields.items() if name in singles]
            together = [fields[name, 0][1] for name in sums if (name, 0) in fields]
            counts = by_link or together
            found[key] = sum(counts) if counts else None
        if self._links:
            states = [ask("GetNvLinkState", link) for link in range(self._links)]
            if any(state is not None for state in states):
                found["nvlink_links_up"] = sum(state == 1 for state in states)
        found["fan_percent"] = ask("GetFanSpeed")
        found["pcie_generation"] = ask("GetCurrPcieLinkGeneration")
        found["pcie_width_lanes"] = ask("GetCurrPcieLinkWidth")
        if not self._pcie_counts and not self._gpm.is_supported:
            # Each watches the bus for 20 ms, and says kB/s.
            found["pcie_sent_bytes_per_second"] = _times(1e3, ask("GetPcieThroughput", _SENT))
            found["pcie_received_bytes_per_second"] = _times(
                1e3, ask("GetPcieThroughput", _RECEIVED)
            )
        return _known(found)

    def processes(self) -> dict[int, int] | None:
        """Bytes that each process has on it, 0 where the driver does not say; None where it lists none."""
        return _processes(self._calls)

    def _count_links(self) -> int:
        link_count: Field = ("NVLINK_LINK_COUNT", 0)
        count = self._calls.fields((link_count,)).get(link_count)
        return min(int(count[1]), _MAX_LINKS) if count else 0

    def _rate(self, name: str, micros: int, value: float) -> float | None:
        """How much the counter has grown in a second. None for the first reading, where the driver has not
        read it anew, and where it or the clock went back: a driver that was loaded again begins from 0."""
        now = micros / 1e6 if micros > 0 else self._clock()
        then, before = self._before.get(name, (now, value))
        if now == then and name in self._before:
            return None
        self._before[name] = now, value
        if now <= then or value < before:
            return None
        return (value - before) / (now - then)


class Instance:
    """One instance of a partitioned GPU (MIG): NVML says its memory, its processes, and since Hopper what its
    units do; the rest is the whole GPU's. Methods as Device's."""

    def __init__(self, library: Any, handle: Any, whole: Any) -> None:
        self._calls = Calls(library, handle)
        number = self._calls.ask("GetGpuInstanceId")
        self._gpm = Gpm(library, whole, number) if number is not None else None

    def close(self) -> None:
        if self._gpm is not None:
            self._gpm.close()

    def often(self) -> dict[str, float]:
        return _known(
            {
                **_memory(self._calls),
                **(self._gpm.read() if self._gpm is not None else {}),
            }
        )

    def rarely(self) -> dict[str, float]:
        return {}

    def processes(self) -> dict[int, int] | None:
        return _processes(self._calls)


def _memory(calls: Calls) -> dict[str, float | None]:
    # Version 2 counts what the driver keeps for itself apart; drivers and bindings may lack it.
    version_2 = getattr(calls.library, "nvmlMemory_v2", None)
    answer = calls.ask("GetMemoryInfo", version_2) if version_2 is not None else None
    if answer is None:
        answer = calls.ask("GetMemoryInfo")
    if answer is None or not answer.total:
        return {}
    return {
        "memory_used_bytes": answer.used,
        "memory_free_bytes": answer.free,
        "memory_reserved_bytes": getattr(answer, "reserved", None),
        "memory_total_bytes": answer.total,
        "memory_used_percent": 100.0 * answer.used / answer.total,
    }


def _processes(calls: Calls) -> dict[int, int] | None:
    compute = _listed(calls, "Compute")
    if compute is None:
        return None
    return {
        one.pid: one.usedGpuMemory or 0 for one in (*compute, *(_listed(calls, "Graphics") or ()))
    }


def _listed(calls: Calls, kind: str) -> Any:
    # By their versions: the name without raises what is no NVMLError where the driver is older.
    found = calls.ask(f"Get{kind}RunningProcesses_v3")
    return found if found is not None else calls.ask(f"Get{kind}RunningProcesses_v2")


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else value * factor


def _known(found: dict[str, float | None]) -> dict[str, float]:
    return {key: float(value) for key, value in found.items() if value is not None}
