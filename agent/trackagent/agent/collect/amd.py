"""AMD's GPUs, through the driver's management library (AMD SMI, by the `amdsmi` that comes with ROCm).

Its functions fail one by one: what a card does not support is learnt once and not asked again, and what fails
for other reasons is left out this time. A GPU that answers nothing is told of once, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trackagent.agent.collect.contract import GpuFacts, Incident, Sample, Unavailable

# As for NVIDIA's.
RARELY_S = 10.0
PROCESSES_S = 60.0

# Of amdsmi_status_t: an argument that this driver does not know, not supported, not yet implemented, no such
# function in the library, no permission.
_NEVER = {1, 2, 3, 5, 10}
_NOT_INIT, _DRIVER_NOT_LOADED = 32, 34
# PCIe: its generation by what a lane carries, in MT/s.
_GENERATIONS = {2500: 1, 5000: 2, 8000: 3, 16000: 4, 32000: 5, 64000: 6}


class _Card:
    """One GPU."""

    def __init__(self, library: Any, handle: Any, gpu: str, now: float) -> None:
        self._library = library
        self._handle = handle
        self._never: set[object] = set()
        self._energy: tuple[float, float] | None = None
        self.rare_at = self.processes_at = now
        asic = self.ask("gpu_asic_info") or {}
        driver = self.ask("gpu_driver_info") or {}
        self.facts = GpuFacts(
            gpu=gpu,
            uuid=self.ask("gpu_device_uuid") or "",
            name=str(asic.get("market_name", "")),
            driver=str(driver.get("driver_version", "")),
        )

    def ask(self, what: str, *arguments: Any) -> Any:
        """What amdsmi_get_`what` says of it, None where it says nothing (now)."""
        call = (what, *arguments)
        if call in self._never:
            return None
        try:
            return getattr(self._library, f"amdsmi_get_{what}")(self._handle, *arguments)
        except AttributeError:  # an older library
            self._never.add(call)
        except self._library.AmdSmiLibraryException as error:
            code = error.get_error_code()
            if code in (_NOT_INIT, _DRIVER_NOT_LOADED):
                raise
            if code in _NEVER:
                self._never.add(call)
        return None

    def often(self) -> dict[str, float]:
        library = self._library
        activity = self.ask("gpu_activity") or {}
        power = self.ask("power_info") or {}
        watts = [power.get(f"{which}_socket_power") for which in ("current", "average")]
        kinds, now = library.AmdSmiTemperatureType, library.AmdSmiTemperatureMetric.CURRENT
        hottest = self.ask("temp_metric", kinds.HOTSPOT, now)
        edge = self.ask("temp_metric", kinds.EDGE, now)
        clocks = library.AmdSmiClkType
        found: dict[str, Any] = {
            "utilization_percent": activity.get("gfx_activity"),
            "memory_utilization_percent": activity.get("umc_activity"),
            "decoder_percent": activity.get("mm_activity"),
            **self._memory(),
            # Which of the two there is depends on the card.
            "power_watts": next((w for w in watts if _is_number(w) and w), None),
            **self._counted_energy(),
            "temperature_celsius": _degrees(hottest if hottest is not None else edge),
            "memory_temperature_celsius": _degrees(self.ask("temp_metric", kinds.VRAM, now)),
            "sm_clock_mhz": (self.ask("clock_info", clocks.GFX) or {}).get("clk"),
            "memory_clock_mhz": (self.ask("clock_info", clocks.MEM) or {}).get("clk"),
        }
        return _numbers(found)

    def _memory(self) -> dict[str, Any]:
        kind = self._library.AmdSmiMemoryType.VRAM
        total, used = self.ask("gpu_memory_total", kind), self.ask("gpu_memory_usage", kind)
        if not total or used is None:
            return {}
        return {
            "memory_used_bytes": used,
            "memory_free_bytes": total - used,
            "memory_total_bytes": total,
            "memory_used_percent": 100.0 * used / total,
        }

    def _counted_energy(self) -> dict[str, Any]:
        """The counter and the mean power since it was last read, by its own clock of nanoseconds."""
        counted = self.ask("energy_count")
        if counted is None:
            return {}
        # Its name up to ROCm 6.0.
        count = counted.get("energy_accumulator", counted.get("power"))
        joules, at_s = count * counted["counter_resolution"] / 1e6, counted["timestamp"] / 1e9
        before, self._energy = self._energy, (joules, at_s)
        found = {"energy_joules_total": joules}
        if before is not None and at_s > before[1] and joules >= before[0]:
            found["power_mean_watts"] = (joules - before[0]) / (at_s - before[1])
        return found

    def rarely(self) -> dict[str, float]:
        cap = self.ask("power_cap_info") or {}
        ecc = self.ask("gpu_total_ecc_count") or {}
        link = (self.ask("pcie_info") or {}).get("pcie_metric", {})
        pages = self.ask("gpu_bad_page_info")
        # The library watches for a tenth of a second.
        held = self.ask("violation_status") or {}
        heat: list[Any] = [
            held.get(f"per_{where}_thrm") for where in ("prochot", "socket", "vr", "hbm")
        ]
        speed, fastest = self.ask("gpu_fan_speed", 0), self.ask("gpu_fan_speed_max", 0)
        found: dict[str, Any] = {
            "power_limit_watts": cap["power_cap"] / 1e6 if cap else None,
            "throttled/power_percent": held.get("per_ppt_pwr"),
            "throttled/thermal_percent": max(
                (one for one in heat if _is_number(one)), default=None
            ),
            "fan_percent": 100.0 * speed / fastest if speed is not None and fastest else None,
            "pcie_generation": _GENERATIONS.get(link.get("pcie_speed", 0)),
            "pcie_width_lanes": link.get("pcie_width"),
            "pcie_replays_total": link.get("pcie_replay_count"),
            "ecc_corrected_errors_total": ecc.get("correctable_count"),
            "ecc_uncorrected_errors_total": ecc.get("uncorrectable_count"),
            "retired_pages": len(pages) if isinstance(pages, list) else None,
        }
        return _numbers(found)

    def processes(self) -> dict[str, float]:
        known = self.ask("gpu_process_list")
        if known is None:
            return {}
        used = {one["pid"]: int(one["mem"]) for one in known if isinstance(one, dict)}
        self.facts = replace(self.facts, processes=used)
        return {"processes": float(len(used))}


class Amd:
    """library: the module amdsmi; clock: seconds, monotonic. Raises Unavailable where there is no GPU."""

    name = "gpu"

    def __init__(self, *, library: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._library = library
        self._clock = clock
        self._cards: list[_Card] = []
        try:
            self._open()
        except library.AmdSmiLibraryException as error:
            raise Unavailable(f"no readings of AMD GPUs: {_words(error)}") from None
        if not self._cards:
            self.close()
            raise Unavailable("no readings of AMD GPUs: the driver shows none here")
        self._facts = tuple(card.facts for card in self._cards)

    def devices(self) -> tuple[GpuFacts, ...]:
        """The GPUs, as they were when they were last read; from any thread."""
        return self._facts

    def sample(self) -> Sequence[Sample | Incident]:
        try:
            if not self._cards:
                self._open()
            found = [one for card in self._cards for one in self._read(card)]
        except self._library.AmdSmiLibraryException as error:
            self.close()  # the next call begins with the driver anew
            raise OSError(f"AMD's driver does not answer: {_words(error)}") from error
        self._facts = tuple(card.facts for card in self._cards)
        return found

    def close(self) -> None:
        """Gives back to the driver what it holds for this collector."""
        self._cards = []
        try:
            self._library.amdsmi_shut_down()
        except self._library.AmdSmiLibraryException:
            return  # the driver is gone by itself

    def _open(self) -> None:
        self._library.amdsmi_init(self._library.AmdSmiInitFlags.INIT_AMD_GPUS)
        now = self._clock()
        self._cards = [
            _Card(self._library, handle, str(index), now)
            for index, handle in enumerate(self._library.amdsmi_get_processor_handles())
        ]

    def _read(self, card: _Card) -> list[Sample | Incident]:
        now, gpu = self._clock(), card.facts.gpu
        readings = [card.often()]
        found: list[Sample | Incident] = []
        if bool(readings[0]) == bool(card.facts.lost):
            found.append(_told(card))
        if now >= card.rare_at:
            card.rare_at = now + RARELY_S
            readings.append(card.rarely())
        if now >= card.processes_at:
            card.processes_at = now + PROCESSES_S
            readings.append(card.processes())
        found += [
            Sample({f"gpu/{gpu}/{key}": value for key, value in values.items()}, gpu=gpu)
            for values in readings
            if values
        ]
        return found


def _told(card: _Card) -> Incident:
    """The library has no word for a GPU that is lost: it is one that does not give a single reading."""
    lost = "" if card.facts.lost else "it gives no reading"
    card.facts = replace(card.facts, lost=lost)
    facts = card.facts
    what = f"does not answer any more: {lost}" if lost else "answers again"
    data: dict[str, object] = {"gpu": facts.gpu, "uuid": facts.uuid}
    if lost:
        data["reason"] = lost
    message = f"GPU {facts.gpu} ({facts.name}, {facts.uuid}) {what}"
    return Incident("error" if lost else "info", message, data)


def _is_number(value: object) -> bool:
    """What a card does not have is the text `N/A`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in found.items() if _is_number(value)}


def _degrees(value: Any) -> float | None:
    """Some versions of the library say thousandths: no card is at 1000 °C, and none that works at 1 °C."""
    if not _is_number(value):
        return None
    return float(value) / 1000.0 if value >= 1000 else float(value)


def _words(error: Any) -> str:
    return str(error.get_error_info())
