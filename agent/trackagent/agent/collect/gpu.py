"""GPUs: which library tells of those of this node, and what is sampled of them."""

from __future__ import annotations

import ctypes
import importlib

from trackagent.agent.collect.amd import Amd
from trackagent.agent.collect.contract import Here, Unavailable
from trackagent.agent.collect.metrics import Metric
from trackagent.agent.collect.nvml import Nvml
from trackagent.agent.collect.nvml_device import POLICIES, THROTTLE_REASONS

_UTILIZATION = "nvmlDeviceGetUtilizationRates"
_MEMORY = "nvmlDeviceGetMemoryInfo"
_LINK_ERRORS = "field values `NVLINK_…`, all links; every 10 s"


# By key, what amdsmi_get_… gives it.
OF_AMD = {
    "utilization_percent": "gpu_activity",
    "memory_utilization_percent": "gpu_activity",
    "decoder_percent": "gpu_activity, of the multimedia engine",
    "memory_used_bytes": "gpu_memory_usage",
    "memory_free_bytes": "gpu_memory_total",
    "memory_total_bytes": "gpu_memory_total",
    "memory_used_percent": "gpu_memory_usage",
    "power_watts": "power_info",
    "power_limit_watts": "power_cap_info, every 10 s",
    "power_mean_watts": "energy_count",
    "energy_joules_total": "energy_count",
    "temperature_celsius": "temp_metric, of the hotspot",
    "memory_temperature_celsius": "temp_metric",
    "sm_clock_mhz": "clock_info",
    "memory_clock_mhz": "clock_info",
    "throttled/power_percent": "violation_status, every 10 s",
    "throttled/thermal_percent": "violation_status, every 10 s",
    "fan_percent": "gpu_fan_speed",
    "pcie_generation": "pcie_info",
    "pcie_width_lanes": "pcie_info",
    "pcie_replays_total": "pcie_info",
    "ecc_corrected_errors_total": "gpu_total_ecc_count",
    "ecc_uncorrected_errors_total": "gpu_total_ecc_count",
    "retired_pages": "gpu_bad_page_info, every 10 s",
    "processes": "gpu_process_list",
}


def _gpu(
    key: str, unit: str, meaning: str, source: str, mlflow: str = "", wandb: str = ""
) -> Metric:
    mlflow = mlflow and f"system/gpu_{{gpu}}_{mlflow}"
    wandb = wandb and f"gpu.{{gpu}}.{wandb}"
    if key in OF_AMD:
        source = "; ".join(filter(None, (source, f"AMD: {OF_AMD[key]}")))
    return Metric(f"gpu/{{gpu}}/{key}", unit, meaning, source, mlflow, wandb)


def _field(name: str, rare: str = "") -> str:
    return f"field value `{name}`{rare}"


def _gpm(name: str) -> str:
    return f"GPM `{name}`; Hopper and later"


_RARE = "; every 10 s"

METRICS = (
    _gpu(
        "utilization_percent",
        "% of the time",
        "a kernel ran, be it on one SM",
        _UTILIZATION,
        "utilization_percentage",
        "gpu",
    ),
    _gpu(
        "memory_utilization_percent",
        "% of the time",
        "memory was read or written",
        _UTILIZATION,
        "",
        "memory",
    ),
    _gpu(
        "encoder_percent",
        "%",
        "of the video encoders",
        "nvmlDeviceGetEncoderUtilization",
        "",
        "encoderUtilization",
    ),
    _gpu("decoder_percent", "%", "of the video decoders", "nvmlDeviceGetDecoderUtilization"),
    _gpu(
        "memory_used_bytes",
        "bytes",
        "given to processes",
        _MEMORY,
        "memory_usage_megabytes × 10^6",
        "memoryAllocatedBytes",
    ),
    _gpu("memory_free_bytes", "bytes", "free", _MEMORY),
    _gpu("memory_reserved_bytes", "bytes", "kept by the driver and the firmware", _MEMORY),
    _gpu("memory_total_bytes", "bytes", "installed", _MEMORY),
    _gpu(
        "memory_used_percent",
        "%",
        "used of total",
        _MEMORY,
        "memory_usage_percentage",
        "memoryAllocated",
    ),
    _gpu(
        "power_watts",
        "W",
        "now, or of the last second: as the card says it",
        "nvmlDeviceGetPowerUsage",
        "power_usage_watts",
        "powerWatts",
    ),
    _gpu(
        "power_limit_watts",
        "W",
        "what it may draw",
        "nvmlDeviceGetEnforcedPowerLimit",
        "",
        "enforcedPowerLimitWatts",
    ),
    _gpu(
        "power_mean_watts",
        "W",
        "mean since the last sample",
        _field("TOTAL_ENERGY_CONSUMPTION"),
    ),
    _gpu(
        "energy_joules_total",
        "J",
        "since the driver was loaded",
        _field("TOTAL_ENERGY_CONSUMPTION"),
    ),
    _gpu("temperature_celsius", "°C", "the GPU", "nvmlDeviceGetTemperature", "", "temp"),
    _gpu("memory_temperature_celsius", "°C", "its memory", _field("MEMORY_TEMP")),
    _gpu("sm_clock_mhz", "MHz", "of the SMs", "nvmlDeviceGetClockInfo", "", "smClock"),
    _gpu("memory_clock_mhz", "MHz", "of the memory", "nvmlDeviceGetClockInfo", "", "memoryClock"),
    *(
        _gpu(
            f"throttle/{name}",
            "0 or 1",
            "this keeps clocks down now",
            "nvmlDeviceGetCurrentClocksEventReasons",
        )
        for name in THROTTLE_REASONS
    ),
    *(
        _gpu(
            f"throttled/{policy.lower()}_percent",
            "% of the time",
            "this kept clocks down since the last sample",
            _field(f"PERF_POLICY_{policy}"),
        )
        for policy in POLICIES
    ),
    _gpu("fan_percent", "%", "of full speed", f"nvmlDeviceGetFanSpeed{_RARE}", "", "fanSpeed"),
    _gpu(
        "pcie_sent_bytes_per_second",
        "bytes/s",
        "from the GPU",
        "GPM, or field value `PCIE_COUNT_TX_BYTES`, or every 10 s nvmlDeviceGetPcieThroughput",
        "",
        "pcieTxBytes",
    ),
    _gpu(
        "pcie_received_bytes_per_second",
        "bytes/s",
        "to the GPU",
        "GPM, or field value `PCIE_COUNT_RX_BYTES`, or every 10 s nvmlDeviceGetPcieThroughput",
        "",
        "pcieRxBytes",
    ),
    _gpu("pcie_generation", "", "of the link now", f"nvmlDeviceGetCurrPcieLinkGeneration{_RARE}"),
    _gpu("pcie_width_lanes", "lanes", "of the link", f"nvmlDeviceGetCurrPcieLinkWidth{_RARE}"),
    _gpu("pcie_replays_total", "", "packets sent again", _field("PCIE_REPLAY_COUNTER", _RARE)),
    _gpu(
        "nvlink_sent_bytes_per_second",
        "bytes/s",
        "over all links",
        "GPM, or field value `NVLINK_THROUGHPUT_DATA_TX`",
        "",
        "nvlinkTxBytes",
    ),
    _gpu(
        "nvlink_received_bytes_per_second",
        "bytes/s",
        "over all links",
        "GPM, or field value `NVLINK_THROUGHPUT_DATA_RX`",
        "",
        "nvlinkRxBytes",
    ),
    _gpu("nvlink_links_up", "links", "active", f"nvmlDeviceGetNvLinkState{_RARE}"),
    _gpu("nvlink_crc_errors_total", "", "damaged packets", _LINK_ERRORS),
    _gpu("nvlink_replay_errors_total", "", "packets sent again", _LINK_ERRORS),
    _gpu("nvlink_recovery_errors_total", "", "links trained anew", _LINK_ERRORS),
    _gpu("nvlink_ecc_errors_total", "", "ECC errors of data", _LINK_ERRORS),
    _gpu("nvlink_receive_errors_total", "", "packets received badly", _LINK_ERRORS),
    _gpu(
        "ecc_corrected_errors_total",
        "",
        "since the driver was loaded",
        _field("ECC_SBE_VOL_TOTAL", _RARE),
    ),
    _gpu(
        "ecc_uncorrected_errors_total",
        "",
        "since the driver was loaded",
        _field("ECC_DBE_VOL_TOTAL", _RARE),
    ),
    _gpu(
        "ecc_corrected_lifetime_errors_total",
        "",
        "since the card was made",
        _field("ECC_SBE_AGG_TOTAL", _RARE),
        "",
        "correctedMemoryErrors",
    ),
    _gpu(
        "ecc_uncorrected_lifetime_errors_total",
        "",
        "since the card was made",
        _field("ECC_DBE_AGG_TOTAL", _RARE),
        "",
        "uncorrectedMemoryErrors",
    ),
    _gpu("retired_pages", "pages", "of memory, for their errors", ""),
    _gpu("retired_pages_single_bit", "pages", "up to Volta", _field("RETIRED_SBE", _RARE)),
    _gpu("retired_pages_double_bit", "pages", "up to Volta", _field("RETIRED_DBE", _RARE)),
    _gpu("retired_pages_pending", "0 or 1", "reset needed", _field("RETIRED_PENDING", _RARE)),
    _gpu("remapped_rows_corrected", "rows", "Ampere and later", _field("REMAPPED_COR", _RARE)),
    _gpu("remapped_rows_uncorrected", "rows", "Ampere and later", _field("REMAPPED_UNC", _RARE)),
    _gpu("remapped_rows_pending", "0 or 1", "reset needed", _field("REMAPPED_PENDING", _RARE)),
    _gpu("remapped_rows_failed", "0 or 1", "no row left to use", _field("REMAPPED_FAILURE", _RARE)),
    _gpu(
        "processes",
        "processes",
        "that use it",
        "nvmlDeviceGetComputeRunningProcesses, …GraphicsRunningProcesses; every 60 s",
    ),
    _gpu(
        "sm_active_percent",
        "% of the time",
        "mean of the SMs with a warp",
        _gpm("SM_UTIL"),
        "",
        "smActive",
    ),
    _gpu(
        "sm_occupancy_percent",
        "%",
        "warps of those that fit",
        _gpm("SM_OCCUPANCY"),
        "",
        "smOccupancy",
    ),
    _gpu(
        "tensor_active_percent",
        "% of the time",
        "tensor cores",
        _gpm("ANY_TENSOR_UTIL"),
        "",
        "pipeTensorActive",
    ),
    _gpu(
        "fp16_active_percent",
        "% of the time",
        "FP16 units",
        _gpm("FP16_UTIL"),
        "",
        "pipeFp16Active",
    ),
    _gpu(
        "fp32_active_percent",
        "% of the time",
        "FP32 units",
        _gpm("FP32_UTIL"),
        "",
        "pipeFp32Active",
    ),
    _gpu(
        "fp64_active_percent",
        "% of the time",
        "FP64 units",
        _gpm("FP64_UTIL"),
        "",
        "pipeFp64Active",
    ),
    _gpu(
        "dram_active_percent",
        "%",
        "of the memory's bandwidth",
        _gpm("DRAM_BW_UTIL"),
        "",
        "dramActive",
    ),
)


def make(here: Here) -> Nvml | Amd:
    """Of NVIDIA where there are such, else of AMD: a node has one kind. Raises Unavailable where there is no
    driver or no GPU."""
    reasons = []
    for made in (_nvidia, _amd):
        try:
            return made(here)
        except Unavailable as error:
            reasons.append(str(error))
    raise Unavailable("; ".join(reasons))


def _nvidia(here: Here) -> Nvml:
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        # Known without the bindings, which take 14 MB.
        reason = "there is no NVIDIA driver here (no libnvidia-ml.so.1)"
        raise Unavailable(f"no readings of NVIDIA GPUs: {reason}") from None
    import pynvml

    return Nvml(library=pynvml)


def _amd(here: Here) -> Amd:
    if not (here.sys / "module" / "amdgpu").is_dir():
        raise Unavailable("no readings of AMD GPUs: there is no AMD driver here (no amdgpu)")
    try:
        amdsmi = importlib.import_module("amdsmi")
    except Exception as error:  # noqa: BLE001 - without its library it ends with whatever it comes upon
        install = "install the amdsmi that comes with ROCm, in the agent's Python"
        raise Unavailable(f"no readings of AMD GPUs: {error!r}; {install}") from None
    return Amd(library=amdsmi)
