"""XIDs: what the NVIDIA driver reports of a GPU as it happens, and else only the kernel's log tells."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

from trackagent.agent.collect.contract import Incident
from trackagent.agent.collect.nvml_calls import TIMEOUT, Lost, is_never

# How many of one moment are told; the rest comes at the next ones.
MAX_AT_ONCE = 32
_NO_INSTANCE = 0xFFFFFFFF
# What docs.nvidia.com/deploy/xid-errors calls them: those that training meets.
_MEANINGS = {
    13: "graphics engine exception",
    31: "GPU memory page fault",
    32: "invalid or corrupted push buffer",
    43: "GPU stopped processing",
    45: "preemptive cleanup, due to previous errors",
    46: "GPU stopped processing",
    48: "double bit ECC error",
    61: "internal microcontroller breakpoint",
    62: "internal microcontroller halt",
    63: "row remapping or page retirement recorded",
    64: "row remapping or page retirement failed",
    68: "video decoder exception",
    69: "graphics engine class error",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high rate of single bit ECC errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    109: "context switch timeout",
    119: "GSP RPC timeout",
    120: "GSP error",
    121: "C2C link error",
    140: "unrecovered ECC error",
    143: "GPU initialization failure",
    144: "NVLink error",
    145: "NVLink error",
    149: "NVLink error",
    154: "GPU recovery action changed",
}
# By the program that ran on the GPU, as a rule, not by the hardware.
_OF_PROGRAMS = {13, 31, 32, 43, 45, 68, 69, 109}


class Xids:
    """Waits for nothing: `read` gives what has come since the last call."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._set: Any = None
        try:
            self._set = library.nvmlEventSetCreate()
        except library.NVMLError as error:
            is_never(error)

    def watch(self, handle: Any) -> None:
        """This GPU's are reported from now on, where the driver does so."""
        if self._set is None:
            return
        wanted = self._library.nvmlEventTypeXidCriticalError
        try:
            if self._library.nvmlDeviceGetSupportedEventTypes(handle) & wanted:
                self._library.nvmlDeviceRegisterEvents(handle, wanted, self._set)
        except self._library.NVMLError as error:
            is_never(error)

    def read(self, names: Mapping[int, tuple[str, str]]) -> list[Incident]:
        """names: the index and the UUID of each GPU by `address` of its handle."""
        found: list[Incident] = []
        while self._set is not None and len(found) < MAX_AT_ONCE:
            try:
                event = self._library.nvmlEventSetWait_v2(self._set, 0)
            except self._library.NVMLError as error:
                if error.value != TIMEOUT:
                    self._give_up(error)
                break
            found.append(_incident(event, names.get(address(event.device), ("?", ""))))
        return found

    def _give_up(self, error: Any) -> None:
        """A GPU that is lost ends no other's events."""
        try:
            if is_never(error):
                self.close()
        except Lost:
            pass

    def close(self) -> None:
        events, self._set = self._set, None
        if events is not None:
            try:
                self._library.nvmlEventSetFree(events)
            except self._library.NVMLError:
                return  # the driver is gone, and it with it


def address(handle: Any) -> int:
    """What two handles of one device have in common."""
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _incident(event: Any, named: tuple[str, str]) -> Incident:
    gpu, uuid = named
    if event.gpuInstanceId != _NO_INSTANCE:
        where = f"GPU {gpu}, instance {event.gpuInstanceId}"
    else:
        where = f"GPU {gpu}"
    xid = int(event.eventData)
    meaning = _MEANINGS.get(xid)
    message = f"{where}: XID {xid}" + (f", {meaning}" if meaning else "")
    level = "warning" if xid in _OF_PROGRAMS else "error"
    data: dict[str, object] = {"gpu": gpu, "uuid": uuid, "xid": xid}
    if event.gpuInstanceId != _NO_INSTANCE:
        data["gpu_instance"] = int(event.gpuInstanceId)
    return Incident(level, message, data)
