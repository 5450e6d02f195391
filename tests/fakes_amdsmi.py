"""AMD's management library without a driver: as much of the module `amdsmi` as the collector asks. Answers
have the shapes that its version 7 gives: dictionaries, `N/A` for what a card lacks, codes for errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

NOT_SUPPORTED, API_FAILED, NO_PERM, NOT_INIT, DRIVER_NOT_LOADED = 2, 7, 10, 32, 34


class AmdSmiLibraryException(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.err_code = code

    def get_error_code(self) -> int:
        return self.err_code

    def get_error_info(self) -> str:
        return f"AMDSMI_STATUS_{self.err_code} - in words"


class AmdSmiInitFlags(IntEnum):
    INIT_AMD_GPUS = 2


class AmdSmiTemperatureType(IntEnum):
    EDGE = 0
    HOTSPOT = 1
    VRAM = 2


class AmdSmiTemperatureMetric(IntEnum):
    CURRENT = 0


class AmdSmiClkType(IntEnum):
    GFX = 0
    MEM = 4


class AmdSmiMemoryType(IntEnum):
    VRAM = 0


def instinct() -> dict[str, Any]:
    """What an MI300X says, by function without amdsmi_get_."""
    return {
        "gpu_asic_info": {"market_name": "AMD Instinct MI300X", "vendor_id": "0x1002"},
        "gpu_driver_info": {"driver_name": "amdgpu", "driver_version": "6.10.5"},
        "gpu_device_uuid": "c4ff74a1-0000-1000-80df-1a2b3c4d5e6f",
        "gpu_activity": {"gfx_activity": 93, "umc_activity": 37, "mm_activity": "N/A"},
        "gpu_memory_total": 192 << 30,
        "gpu_memory_usage": 48 << 30,
        "power_info": {"current_socket_power": 612, "average_socket_power": "N/A"},
        "power_cap_info": {"power_cap": 750_000_000, "max_power_cap": 750_000_000},
        "energy_count": {
            "energy_accumulator": 1_000_000,
            "counter_resolution": 16.0,
            "timestamp": 5_000_000_000,
        },
        "temp_metric": {AmdSmiTemperatureType.HOTSPOT: 71, AmdSmiTemperatureType.VRAM: 64},
        "clock_info": {
            AmdSmiClkType.GFX: {"clk": 2100, "min_clk": 132},
            AmdSmiClkType.MEM: {"clk": 1300, "min_clk": 900},
        },
        "gpu_total_ecc_count": {"correctable_count": 5, "uncorrectable_count": 1},
        "pcie_info": {
            "pcie_static": {"max_pcie_width": 16},
            "pcie_metric": {"pcie_width": 16, "pcie_speed": 32000, "pcie_replay_count": 2},
        },
        "gpu_bad_page_info": [],
        "violation_status": {
            "per_ppt_pwr": 25,
            "per_prochot_thrm": 0,
            "per_socket_thrm": 12,
            "per_vr_thrm": "N/A",
            "per_hbm_thrm": 3,
        },
        "gpu_process_list": [{"name": "python", "pid": 4242, "mem": 1 << 30}],
    }


def radeon() -> dict[str, Any]:
    """What a workstation's card says: an older library's thousandths of a degree, a fan, the edge's
    temperature, a power that is a mean, and a multimedia engine."""
    return instinct() | {
        "gpu_asic_info": {"market_name": "Radeon Pro W7900"},
        "gpu_activity": {"gfx_activity": 10, "umc_activity": 5, "mm_activity": 50},
        "power_info": {"current_socket_power": "N/A", "average_socket_power": 180},
        "temp_metric": {AmdSmiTemperatureType.EDGE: 54_000},
        "gpu_fan_speed": 51,
        "gpu_fan_speed_max": 255,
        "violation_status": None,
    }


@dataclass
class FakeAmdSmi:
    """The module. cards: by function, the answer of each; a dict by argument; None: not supported, an int of
    `fails`: that error; `lacks`: no such function. init: what amdsmi_init fails with, 0 for nothing."""

    cards: list[dict[str, Any]]
    init: int = 0
    fails: dict[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    lacks: set[str] = field(default_factory=set)
    initialized: int = 0

    AmdSmiLibraryException = AmdSmiLibraryException
    AmdSmiInitFlags = AmdSmiInitFlags
    AmdSmiTemperatureType = AmdSmiTemperatureType
    AmdSmiTemperatureMetric = AmdSmiTemperatureMetric
    AmdSmiClkType = AmdSmiClkType
    AmdSmiMemoryType = AmdSmiMemoryType

    def amdsmi_init(self, flag: AmdSmiInitFlags) -> None:
        if self.init:
            raise AmdSmiLibraryException(self.init)
        self.initialized += 1

    def amdsmi_shut_down(self) -> None:
        self.initialized -= 1

    def amdsmi_get_processor_handles(self) -> list[int]:
        return list(range(len(self.cards)))

    def __getattr__(self, name: str) -> Any:
        what = name.removeprefix("amdsmi_get_")
        if what == name or what in self.lacks:
            raise AttributeError(name)

        def function(handle: int, *arguments: Any) -> Any:
            self.calls.append(what)
            if code := self.fails.get(what, self.fails.get(f"card {handle}", 0)):
                raise AmdSmiLibraryException(code)
            answer = self.cards[handle].get(what)
            if isinstance(answer, dict) and arguments:
                answer = answer.get(arguments[0])
            if answer is None:
                raise AmdSmiLibraryException(NOT_SUPPORTED)
            return answer

        return function
