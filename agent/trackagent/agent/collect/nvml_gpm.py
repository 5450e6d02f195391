"""What the counters inside an NVIDIA GPU say of the time between two moments (GPM, Hopper and later): which
units were at work, where "utilization" only says that some kernel ran.

NVML takes a sample of all counters and compares two of them; so the first reading of a device is empty.
"""

from __future__ import annotations

import math
from typing import Any

from trackagent.agent.collect.nvml_calls import is_never

_MIB = float(1 << 20)
# NVML_GPM_METRIC_…: the key, and what makes its unit of NVML's.
_WANTED = {
    "SM_UTIL": ("sm_active_percent", 1.0),
    "SM_OCCUPANCY": ("sm_occupancy_percent", 1.0),
    "ANY_TENSOR_UTIL": ("tensor_active_percent", 1.0),
    "FP16_UTIL": ("fp16_active_percent", 1.0),
    "FP32_UTIL": ("fp32_active_percent", 1.0),
    "FP64_UTIL": ("fp64_active_percent", 1.0),
    "DRAM_BW_UTIL": ("dram_active_percent", 1.0),
    "PCIE_TX_PER_SEC": ("pcie_sent_bytes_per_second", _MIB),
    "PCIE_RX_PER_SEC": ("pcie_received_bytes_per_second", _MIB),
    "NVLINK_TOTAL_TX_PER_SEC": ("nvlink_sent_bytes_per_second", _MIB),
    "NVLINK_TOTAL_RX_PER_SEC": ("nvlink_received_bytes_per_second", _MIB),
}


class Gpm:
    """The counters of one GPU, or of instance `instance` of a partitioned one. handle: the GPU's, whole."""

    def __init__(self, library: Any, handle: Any, instance: int | None = None) -> None:
        self._library = library
        self._handle = handle
        self._instance = instance
        self._before: Any = None
        self._spare: Any = None
        self._request: Any = None
        self.is_supported = self._ask_support()

    def _ask_support(self) -> bool:
        try:
            return bool(self._library.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice)
        except AttributeError:  # older bindings
            return False
        except self._library.NVMLError as error:
            is_never(error)
            return False

    def read(self) -> dict[str, float]:
        """By key, what was since the last call. Raises as nvml_calls.is_never."""
        if not self.is_supported:
            return {}
        try:
            now = self._sample()
            before, self._before = self._before, now
            self._spare = before
            return {} if before is None else self._compare(before, now)
        except self._library.NVMLError as error:
            if is_never(error):
                self.is_supported = False
                self.close()
            return {}

    def _sample(self) -> Any:
        if self._spare is None:
            self._spare = self._library.nvmlGpmSampleAlloc()
        if self._instance is None:
            self._library.nvmlGpmSampleGet(self._handle, self._spare)
        else:
            self._library.nvmlGpmMigSampleGet(self._handle, self._instance, self._spare)
        return self._spare

    def _compare(self, before: Any, now: Any) -> dict[str, float]:
        names = list(_WANTED)
        if self._request is None:
            # 20 kB with room for every metric that there is: made once.
            self._request = self._library.c_nvmlGpmMetricsGet_t()
            self._request.version = self._library.NVML_GPM_METRICS_GET_VERSION
            self._request.numMetrics = len(names)
            for place, name in enumerate(names):
                metric = getattr(self._library, f"NVML_GPM_METRIC_{name}")
                self._request.metrics[place].metricId = metric
        self._request.sample1, self._request.sample2 = before, now
        self._library.nvmlGpmMetricsGet(self._request)
        found: dict[str, float] = {}
        for place, name in enumerate(names):
            metric = self._request.metrics[place]
            if metric.nvmlReturn == 0 and math.isfinite(metric.value):
                key, factor = _WANTED[name]
                found[key] = metric.value * factor
        return found

    def close(self) -> None:
        """Gives the samples back to the driver."""
        samples, self._before, self._spare = (self._before, self._spare), None, None
        for sample in samples:
            if sample is None:
                continue
            try:
                self._library.nvmlGpmSampleFree(sample)
            except self._library.NVMLError:
                return  # the driver is gone, and they with it
