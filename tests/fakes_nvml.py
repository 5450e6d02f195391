"""NVIDIA's driver library without a driver: the real bindings (pynvml, a copy of the module) call functions
whose answers are made up here. So structures, errors and arguments are the bindings' own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import pynvml

SUCCESS, INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND = 0, 2, 3, 4, 6
INSUFFICIENT_SIZE, TIMEOUT, GPU_IS_LOST, UNKNOWN = 7, 10, 15, 999
NO_INSTANCE = 0xFFFFFFFF
ALL_LINKS = 0xFFFFFFFF

# By nvmlFieldValue_t.valueType.
DOUBLE, UINT, ULONG_LONG = 0, 1, 3
_MEMBERS = {DOUBLE: "dVal", UINT: "uiVal", ULONG_LONG: "ullVal"}


@dataclass
class FakeInstance:
    """An instance of a partitioned GPU."""

    uuid: str
    name: str
    number: int
    memory: tuple[int, int, int, int] = (10 << 30, 1 << 20, 9 << 30, 1 << 30)
    processes: dict[int, int | None] = field(default_factory=dict)
    gpm: dict[str, float] = field(default_factory=dict)
    handle: Any = field(default_factory=ctypes.c_uint64)


@dataclass
class FakeGpu:
    """answers: by the name of a function without nvmlDevice, what it gives for arguments; what is missing is
    not supported. fields: by NVML_FI_DEV_ name, or name and scope, type and value. gpm: by NVML_GPM_METRIC_
    name. fails: by field, or by function without nvmlDevice, nvml and its version, the code that it returns;
    "" for every function."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    answers: dict[str, Any] = field(default_factory=dict)
    fields: dict[str | tuple[str, int], tuple[int, float]] = field(default_factory=dict)
    memory: tuple[int, int, int, int] = (80 << 30, 1 << 29, 60 << 30, 20 << 30)
    gpm: dict[str, float] | None = None
    processes: dict[int, int | None] = field(default_factory=dict)
    mig: list[FakeInstance] | None = None
    fails: dict[str, int] = field(default_factory=dict)
    handle: Any = field(default_factory=ctypes.c_uint64)


def fake_nvml(gpus: list[FakeGpu], **driver: Any) -> Any:
    """A copy of the module pynvml over a fake driver, which is its `nvmlLib`: one copy a process, so that
    there is one driver at a time."""
    bindings = _bindings()
    bindings.nvmlLib = FakeDriver(bindings, gpus, **driver)
    bindings._nvmlGetFunctionPointer_cache.clear()
    return bindings


@functools.cache
def _bindings() -> Any:
    spec = importlib.util.spec_from_file_location("pynvml_over_a_fake", pynvml.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # It looks itself up there, to make its classes of errors.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


class FakeDriver:
    """libnvidia-ml.so.1. missing: functions that it lacks, as an older one; init: what nvmlInit returns."""

    def __init__(
        self,
        bindings: Any,
        gpus: list[FakeGpu],
        *,
        missing: frozenset[str] = frozenset(),
        init: int = SUCCESS,
        version: str = "550.54.15",
    ) -> None:
        self.gpus = gpus
        self.calls: list[tuple[str, ...]] = []
        # Of functions that are of no GPU.
        self.fails: dict[str, int] = {}
        self.now_micros = 1_700_000_000_000_000
        self.events: list[tuple[FakeGpu, int, int]] = []
        self.initialized = 0
        self.samples = 0
        self.event_sets = 0
        self._bindings = bindings
        self._missing = missing
        self._init = init
        self._version = version
        self._watched: set[str] = set()
        self._fields = {
            number: name.removeprefix("NVML_FI_DEV_")
            for name, number in vars(bindings).items()
            if name.startswith("NVML_FI_DEV_") and not name.startswith("NVML_FI_DEV_CLOCKS")
        }
        self._gpm = {
            number: name.removeprefix("NVML_GPM_METRIC_")
            for name, number in vars(bindings).items()
            if name.startswith("NVML_GPM_METRIC_")
        }
        self._kept: list[Any] = []
        self._sampled: dict[int, dict[str, float]] = {}
        self.nvmlErrorString = _Words()

    def count(self, function: str) -> int:
        """How often it was called."""
        return sum(call[0] == function for call in self.calls)

    def __getattr__(self, name: str) -> Any:
        """A function of the device that answers a number, several, or that it is not supported."""
        if name in self.__dict__.get("_missing", ()) or not name.startswith("nvml"):
            raise AttributeError(name)
        own = _FUNCTIONS.get(name)
        if own is None and not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def function(*arguments: Any) -> int:
            self.calls.append((name, *(str(getattr(a, "value", "")) for a in arguments)))
            code: int = self._failing(name, arguments)
            if code == SUCCESS:
                if own is not None:
                    code = own(self, *arguments)
                else:
                    code = self._answer(name.removeprefix("nvmlDevice"), *arguments)
            return code

        return function

    def _answer(self, name: str, handle: Any, *arguments: Any) -> int:
        gpu = self._gpu(handle)
        if isinstance(gpu, FakeInstance):
            return NOT_SUPPORTED
        asked = [a for a in arguments if not hasattr(a, "_obj")]
        results = [a._obj for a in arguments if hasattr(a, "_obj")]
        answer = gpu.answers.get(name)
        if isinstance(answer, dict):
            answer = answer.get(*(getattr(a, "value", a) for a in asked))
        if answer is None:
            return NOT_SUPPORTED
        values = answer if isinstance(answer, tuple) else (answer,)
        if hasattr(results[0], "_fields_"):
            for (member, *_), value in zip(results[0]._fields_, values, strict=True):
                setattr(results[0], member, value)
        else:
            for result, value in zip(results, values, strict=True):
                result.value = value
        return SUCCESS

    def _failing(self, name: str, arguments: tuple[Any, ...]) -> int:
        """What the function is to fail with, of the GPU that it is asked of."""
        if name == "nvmlDeviceGetHandleByIndex_v2":
            gpu = self.gpus[arguments[0].value]
        elif arguments and isinstance(arguments[0], self._bindings.c_nvmlDevice_t):
            known = self._gpu(arguments[0])
            gpu = next(one for one in self.gpus if known is one or known in (one.mig or ()))
        else:
            return self.fails.get(name, SUCCESS)
        short = re.sub("^nvml(Device)?|_v[0-9]$", "", name)
        return gpu.fails.get(short, gpu.fails.get("", SUCCESS))

    def _gpu(self, handle: Any) -> FakeGpu | FakeInstance:
        address = ctypes.addressof(handle.contents)
        for gpu in self.gpus:
            for known in (gpu, *(gpu.mig or ())):
                if ctypes.addressof(known.handle) == address:
                    return known
        raise AssertionError(f"there is no device {handle}")


def _point(handle: Any, where: Any) -> None:
    """Makes an opaque handle of the bindings refer to something of the driver's."""
    ctypes.c_void_p.from_buffer(handle).value = ctypes.addressof(where)


class _Words:
    def __call__(self, code: int) -> bytes:
        return f"error {code}".encode()


def _init(self: FakeDriver, flags: int) -> int:
    self.initialized += self._init == SUCCESS
    return self._init


def _shutdown(self: FakeDriver) -> int:
    self.initialized -= 1
    return SUCCESS


def _version(self: FakeDriver, text: Any, size: Any) -> int:
    text.value = self._version.encode()
    return SUCCESS


def _count(self: FakeDriver, count: Any) -> int:
    count._obj.value = len(self.gpus)
    return SUCCESS


def _by_index(self: FakeDriver, index: Any, handle: Any) -> int:
    gpu = self.gpus[index.value]
    _point(handle._obj, gpu.handle)
    return SUCCESS


def _uuid(self: FakeDriver, handle: Any, text: Any, size: Any) -> int:
    text.value = self._gpu(handle).uuid.encode()
    return SUCCESS


def _name(self: FakeDriver, handle: Any, text: Any, size: Any) -> int:
    text.value = self._gpu(handle).name.encode()
    return SUCCESS


def _memory(self: FakeDriver, handle: Any, result: Any) -> int:
    gpu = self._gpu(handle)
    total, reserved, free, used = gpu.memory
    result._obj.total, result._obj.free, result._obj.used = total, free, used
    if hasattr(result._obj, "reserved"):
        result._obj.reserved = reserved
    else:
        result._obj.used = used + reserved
    return SUCCESS


def _field_values(self: FakeDriver, handle: Any, count: Any, values: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    for value in values._obj[: count.value]:
        name = self._fields[value.fieldId]
        known = gpu.fields.get((name, value.scopeId)) if value.scopeId else gpu.fields.get(name)
        value.timestamp = self.now_micros
        value.nvmlReturn = SUCCESS if known else gpu.fails.get(name, NOT_SUPPORTED)
        if known:
            value.valueType = known[0]
            setattr(value.value, _MEMBERS[known[0]], known[1])
    return SUCCESS


def _processes(self: FakeDriver, handle: Any, count: Any, known: Any) -> int:
    processes = self._gpu(handle).processes
    if known is None:
        count._obj.value = len(processes)
        return INSUFFICIENT_SIZE if processes else SUCCESS
    for place, (pid, used) in enumerate(processes.items()):
        known[place].pid = pid
        known[place].usedGpuMemory = ctypes.c_ulonglong(-1).value if used is None else used
    count._obj.value = len(processes)
    return SUCCESS


def _no_processes(self: FakeDriver, handle: Any, count: Any, known: Any) -> int:
    count._obj.value = 0
    return SUCCESS


def _link_state(self: FakeDriver, handle: Any, link: int, active: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    states = gpu.answers.get("NvLinkStates")
    if states is None:
        return NOT_SUPPORTED
    active._obj.value = states[link]
    return SUCCESS


def _mig_mode(self: FakeDriver, handle: Any, current: Any, pending: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    if gpu.mig is None:
        return NOT_SUPPORTED
    current._obj.value = pending._obj.value = 1
    return SUCCESS


def _max_mig(self: FakeDriver, handle: Any, count: Any) -> int:
    count._obj.value = 7
    return SUCCESS


def _mig_by_index(self: FakeDriver, handle: Any, index: Any, mig: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    if index.value >= len(gpu.mig or ()):
        return NOT_FOUND
    _point(mig._obj, (gpu.mig or [])[index.value].handle)
    return SUCCESS


def _instance_id(self: FakeDriver, handle: Any, number: Any) -> int:
    instance = self._gpu(handle)
    assert isinstance(instance, FakeInstance)
    number._obj.value = instance.number
    return SUCCESS


def _gpm_support(self: FakeDriver, handle: Any, support: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    support._obj.isSupportedDevice = gpu.gpm is not None
    return SUCCESS


def _gpm_alloc(self: FakeDriver, sample: Any) -> int:
    made = ctypes.c_uint64()
    self._kept.append(made)
    self.samples += 1
    _point(sample._obj, made)
    return SUCCESS


def _gpm_free(self: FakeDriver, sample: Any) -> int:
    self.samples -= 1
    return SUCCESS


def _gpm_sample(self: FakeDriver, handle: Any, sample: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    self._sampled[ctypes.addressof(sample.contents)] = dict(gpu.gpm or {})
    return SUCCESS


def _gpm_mig_sample(self: FakeDriver, handle: Any, number: int, sample: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    instance = next(one for one in gpu.mig or () if one.number == number)
    self._sampled[ctypes.addressof(sample.contents)] = dict(instance.gpm)
    return SUCCESS


def _gpm_metrics(self: FakeDriver, request: Any) -> int:
    asked = request._obj
    assert asked.version == self._bindings.NVML_GPM_METRICS_GET_VERSION
    samples = [ctypes.addressof(one.contents) for one in (asked.sample1, asked.sample2)]
    assert samples[0] != samples[1]
    values = self._sampled[samples[1]]
    for place in range(asked.numMetrics):
        metric = asked.metrics[place]
        name = self._gpm[metric.metricId]
        metric.nvmlReturn = SUCCESS if name in values else NOT_SUPPORTED
        metric.value = values.get(name, 0.0)
    return SUCCESS


def _event_set(self: FakeDriver, events: Any) -> int:
    made = ctypes.c_uint64()
    self._kept.append(made)
    self.event_sets += 1
    _point(events._obj, made)
    return SUCCESS


def _free_event_set(self: FakeDriver, events: Any) -> int:
    self.event_sets -= 1
    return SUCCESS


def _event_types(self: FakeDriver, handle: Any, types: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    types._obj.value = gpu.answers.get("EventTypes", self._bindings.nvmlEventTypeXidCriticalError)
    return SUCCESS


def _register(self: FakeDriver, handle: Any, types: Any, events: Any) -> int:
    gpu = self._gpu(handle)
    assert isinstance(gpu, FakeGpu)
    assert types.value == self._bindings.nvmlEventTypeXidCriticalError
    self._watched.add(gpu.uuid)
    return SUCCESS


def _wait(self: FakeDriver, events: Any, data: Any, timeout_ms: Any) -> int:
    assert timeout_ms.value == 0
    while self.events:
        gpu, xid, instance = self.events.pop(0)
        if gpu.uuid in self._watched:
            _point(data._obj.device, gpu.handle)
            data._obj.eventType = self._bindings.nvmlEventTypeXidCriticalError
            data._obj.eventData = xid
            data._obj.gpuInstanceId = instance
            data._obj.computeInstanceId = NO_INSTANCE
            return SUCCESS
    return TIMEOUT


_FUNCTIONS: dict[str, Any] = {
    "nvmlInitWithFlags": _init,
    "nvmlShutdown": _shutdown,
    "nvmlSystemGetDriverVersion": _version,
    "nvmlDeviceGetCount_v2": _count,
    "nvmlDeviceGetHandleByIndex_v2": _by_index,
    "nvmlDeviceGetUUID": _uuid,
    "nvmlDeviceGetName": _name,
    "nvmlDeviceGetMemoryInfo": _memory,
    "nvmlDeviceGetMemoryInfo_v2": _memory,
    "nvmlDeviceGetFieldValues": _field_values,
    "nvmlDeviceGetComputeRunningProcesses_v3": _processes,
    "nvmlDeviceGetComputeRunningProcesses_v2": _processes,
    "nvmlDeviceGetGraphicsRunningProcesses_v3": _no_processes,
    "nvmlDeviceGetNvLinkState": _link_state,
    "nvmlDeviceGetMigMode": _mig_mode,
    "nvmlDeviceGetMaxMigDeviceCount": _max_mig,
    "nvmlDeviceGetMigDeviceHandleByIndex": _mig_by_index,
    "nvmlDeviceGetGpuInstanceId": _instance_id,
    "nvmlDeviceGetSupportedEventTypes": _event_types,
    "nvmlDeviceRegisterEvents": _register,
    "nvmlEventSetCreate": _event_set,
    "nvmlEventSetFree": _free_event_set,
    "nvmlEventSetWait_v2": _wait,
    "nvmlGpmQueryDeviceSupport": _gpm_support,
    "nvmlGpmSampleAlloc": _gpm_alloc,
    "nvmlGpmSampleFree": _gpm_free,
    "nvmlGpmSampleGet": _gpm_sample,
    "nvmlGpmMigSampleGet": _gpm_mig_sample,
    "nvmlGpmMetricsGet": _gpm_metrics,
}
