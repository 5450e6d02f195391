"""Asking one NVIDIA device through NVML, whose functions fail one by one.

What a device or its driver does not support is learnt once and not asked again; what fails for other reasons
is left out this time. A device that is lost raises Lost, a driver that is gone the library's own error.
"""

from __future__ import annotations

from typing import Any

# Codes of nvmlReturn_t, which no version changes; older bindings lack the names of some.
UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION = 1, 2, 3, 4
DRIVER_NOT_LOADED, TIMEOUT, LIBRARY_NOT_FOUND, FUNCTION_NOT_FOUND = 9, 10, 12, 13
GPU_IS_LOST, RESET_REQUIRED, LIB_RM_VERSION_MISMATCH, VGPU_ECC_NOT_SUPPORTED = 15, 16, 18, 22
ARGUMENT_VERSION_MISMATCH, DEPRECATED, GPU_NOT_FOUND = 25, 26, 28
_NEVER = {
    INVALID_ARGUMENT,  # a field or an enum that this driver does not know
    NOT_SUPPORTED,
    NO_PERMISSION,
    FUNCTION_NOT_FOUND,
    VGPU_ECC_NOT_SUPPORTED,
    ARGUMENT_VERSION_MISMATCH,
    DEPRECATED,
}
_LOST = {GPU_IS_LOST, RESET_REQUIRED, GPU_NOT_FOUND}
_DRIVER_GONE = {UNINITIALIZED, DRIVER_NOT_LOADED}

# nvmlFieldValue_t.valueType: which member of the union holds the value.
_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
NARROW = {"uiVal", "siVal", "usVal"}

# As NVML's fields are named without NVML_FI_DEV_: alone, or with what they are asked of, such as a link.
Field = tuple[str, int]


class Lost(Exception):
    """The device does not answer any more; the message is NVML's."""


class Calls:
    """What one device can be asked. library: the module pynvml; handle: the device's in it."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library = library
        self.handle = handle
        self._never: set[object] = set()

    def ask(self, function: str, *arguments: Any) -> Any:
        """What nvmlDevice`function` says of the device, None where it says nothing (now)."""
        call = (function, *arguments)
        if call in self._never:
            return None
        try:
            return getattr(self.library, f"nvmlDevice{function}")(self.handle, *arguments)
        except AttributeError:  # older bindings
            self._never.add(call)
        except self.library.NVMLError as error:
            if is_never(error):
                self._never.add(call)
        return None

    def fields(self, wanted: tuple[Field, ...]) -> dict[Field, tuple[int, float, str]]:
        """The fields that the device gives, of these, by one call of the driver: the moment at which each was
        read, in microseconds, its value, and the member of NVML's union that held it."""
        asked = [one for one in wanted if one not in self._never]
        numbers = [getattr(self.library, f"NVML_FI_DEV_{name}", None) for name, _ in asked]
        self._never.update(
            one for one, number in zip(asked, numbers, strict=True) if number is None
        )
        known = [(one, n) for one, n in zip(asked, numbers, strict=True) if n is not None]
        # That a driver refuses all of them together says nothing of one.
        if not known or wanted in self._never:
            return {}
        try:
            ids = [(number, scope) for (_, scope), number in known]
            answers = self.library.nvmlDeviceGetFieldValues(self.handle, ids)
        except self.library.NVMLError as error:
            if is_never(error):
                self._never.add(wanted)
            return {}
        found: dict[Field, tuple[int, float, str]] = {}
        for (field, _), answer in zip(known, answers, strict=True):
            if answer.nvmlReturn == 0:
                member = _MEMBERS[answer.valueType]
                found[field] = answer.timestamp, float(getattr(answer.value, member)), member
            elif is_never(self.library.NVMLError(answer.nvmlReturn)):
                self._never.add(field)
        return found


def is_never(error: Any) -> bool:
    """Whether there is no use in asking the same again after this NVMLError. Raises it where the driver is
    gone, and Lost where the device is."""
    if error.value in _LOST:
        raise Lost(str(error)) from error
    if error.value in _DRIVER_GONE:
        raise error
    return error.value in _NEVER
