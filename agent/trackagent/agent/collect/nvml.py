"""NVIDIA GPUs, whole and partitioned (MIG), through the driver's management library (NVML, by nvidia-ml-py).

A GPU is known by its UUID and shown by its index. One that is lost is told of once, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from trackagent.agent.collect.contract import GpuFacts, Incident, Sample, Unavailable
from trackagent.agent.collect.nvml_calls import (
    DRIVER_NOT_LOADED,
    FUNCTION_NOT_FOUND,
    LIB_RM_VERSION_MISMATCH,
    LIBRARY_NOT_FOUND,
    Lost,
    is_never,
)
from trackagent.agent.collect.nvml_device import Device, Instance
from trackagent.agent.collect.nvml_events import Xids, address

# How often what seldom changes is read, and how a GPU is partitioned.
RARELY_S = 10.0
# Listing processes holds a lock of the driver's, which those that start and end need.
PROCESSES_S = 60.0
# How often a lost GPU is tried again.
LOST_S = 60.0

_REASONS = {
    LIBRARY_NOT_FOUND: "there is no NVIDIA driver here (no libnvidia-ml.so.1)",
    DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    FUNCTION_NOT_FOUND: "the NVIDIA driver is too old: its NVML lacks what the readings need",
    LIB_RM_VERSION_MISMATCH: "the NVIDIA driver and its library are of different versions, as after an "
    "update: restart the node",
}


class _Shown:
    """A GPU or an instance that is shown. device: None while it is lost."""

    def __init__(self, facts: GpuFacts, now: float) -> None:
        self.facts = facts
        self.device: Device | Instance | None = None
        self.rare_at = self.processes_at = now
        self.again_at = 0.0

    def read(self, now: float) -> list[dict[str, float]]:
        """Its readings, those of each pace apart."""
        assert self.device is not None
        found = [self.device.often()]
        if now >= self.rare_at:
            self.rare_at = now + RARELY_S
            found.append(self.device.rarely())
        if now >= self.processes_at:
            self.processes_at = now + PROCESSES_S
            processes = self.device.processes()
            if processes is not None:
                self.facts = replace(self.facts, processes=processes)
                found.append({"processes": float(len(processes))})
        return found

    def close(self) -> None:
        device, self.device = self.device, None
        if device is not None:
            device.close()


class _Gpu(_Shown):
    """A whole GPU, and the instances that it is partitioned into, by UUID."""

    def __init__(self, facts: GpuFacts, now: float) -> None:
        super().__init__(facts, now)
        self.handle: Any = None
        self.instances: dict[str, _Shown] = {}

    def close(self) -> None:
        for instance in self.instances.values():
            instance.close()
        self.instances = {}
        super().close()


class Nvml:
    """library: the module pynvml; clock: seconds, monotonic. Raises Unavailable where there is no driver or
    no GPU."""

    name = "gpu"

    def __init__(self, *, library: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._library = library
        self._clock = clock
        self._driver = ""
        self._gpus: list[_Gpu] = []
        self._xids: Xids | None = None
        # Index and UUID by the address of the handle.
        self._names: dict[int, tuple[str, str]] = {}
        # Indexes of the GPUs of which it is known that they are lost.
        self._told: set[str] = set()
        self._incidents: list[Incident] = []
        self._facts: tuple[GpuFacts, ...] = ()
        try:
            self._open()
        except library.NVMLError as error:
            reason = _REASONS.get(error.value, f"NVML cannot be used: {error}")
            raise Unavailable(f"no readings of NVIDIA GPUs: {reason}") from None
        if not self._gpus:
            self.close()
            raise Unavailable("no readings of NVIDIA GPUs: the driver shows none here")

    def devices(self) -> tuple[GpuFacts, ...]:
        """The GPUs, each before the instances that it is partitioned into, as they were when they were last
        read; from any thread."""
        return self._facts

    def sample(self) -> Sequence[Sample | Incident]:
        if not self._gpus:
            self._open()
        now = self._clock()
        found: list[Sample | Incident] = []
        if self._xids is not None:
            found += self._xids.read(self._names)
        for gpu in self._gpus:
            try:
                if gpu.device is None and now >= gpu.again_at:
                    self._begin(gpu)
                if gpu.device is not None:
                    found += self._read(gpu, now)
            except Lost as reason:
                self._lose(gpu, str(reason), now)
        found += self._incidents
        self._incidents = []
        self._facts = tuple(
            shown.facts for gpu in self._gpus for shown in (gpu, *gpu.instances.values())
        )
        if not found and all(gpu.device is None for gpu in self._gpus):
            why = self._gpus[0].facts.lost if self._gpus else "the driver shows none"
            self.close()  # the next call begins with the driver anew
            raise OSError(f"no NVIDIA GPU answers: {why}")
        return found

    def close(self) -> None:
        """Gives back to the driver what it holds for this collector."""
        for gpu in self._gpus:
            gpu.close()
        self._gpus = []
        if self._xids is None:
            return
        self._xids.close()
        self._xids = None
        try:
            self._library.nvmlShutdown()
        except self._library.NVMLError:
            return  # the driver is gone by itself

    # --- which there are

    def _open(self) -> None:
        self._library.nvmlInit()
        self._xids = Xids(self._library)
        self._driver = self._library.nvmlSystemGetDriverVersion()
        now = self._clock()
        for index in range(self._library.nvmlDeviceGetCount()):
            facts = GpuFacts(gpu=str(index), uuid="", name="", driver=self._driver)
            self._gpus.append(gpu := _Gpu(facts, now))
            try:
                self._begin(gpu)
            except Lost as reason:
                self._lose(gpu, str(reason), now)
        self._facts = tuple(gpu.facts for gpu in self._gpus)

    def _begin(self, gpu: _Gpu) -> None:
        """Finds the GPU and what it can be asked, at first and after it was lost."""
        library, index = self._library, gpu.facts.gpu
        try:
            handle = library.nvmlDeviceGetHandleByIndex(int(index))
            uuid, name = library.nvmlDeviceGetUUID(handle), library.nvmlDeviceGetName(handle)
        except library.NVMLError as error:
            is_never(error)
            raise Lost(str(error)) from None  # it may not be used, has too little power, …
        device = Device(library, handle, self._clock)
        if self._xids is not None:
            self._xids.watch(handle)
        gpu.handle, gpu.device = handle, device
        gpu.facts = replace(gpu.facts, uuid=uuid, name=name, lost="")
        self._names[address(handle)] = index, uuid
        if index in self._told:
            self._told.discard(index)
            self._tell("info", gpu, "answers again")

    def _lose(self, gpu: _Gpu, reason: str, now: float) -> None:
        gpu.close()
        gpu.facts = replace(gpu.facts, lost=reason, processes={})
        gpu.again_at = now + LOST_S
        if gpu.facts.gpu not in self._told:
            self._told.add(gpu.facts.gpu)
            self._tell("error", gpu, f"does not answer any more: {reason}", reason=reason)

    def _tell(self, level: str, gpu: _Gpu, what: str, **data: object) -> None:
        facts = gpu.facts
        named = (
            f"GPU {facts.gpu} ({facts.name}, {facts.uuid})" if facts.uuid else f"GPU {facts.gpu}"
        )
        found: dict[str, object] = {"gpu": facts.gpu, "uuid": facts.uuid, **data}
        self._incidents.append(Incident(level, f"{named} {what}", found))

    # --- what they say

    def _read(self, gpu: _Gpu, now: float) -> list[Sample | Incident]:
        if now >= gpu.rare_at:
            self._find_instances(gpu, now)
        found: list[Sample | Incident] = []
        for shown in (gpu, *gpu.instances.values()):
            index = shown.facts.gpu
            found += [
                Sample({f"gpu/{index}/{key}": value for key, value in values.items()}, gpu=index)
                for values in shown.read(now)
                if values
            ]
        return found

    def _find_instances(self, gpu: _Gpu, now: float) -> None:
        """An operator may partition a GPU anew at any time."""
        before, gpu.instances = gpu.instances, {}
        for number, handle in self._instances(gpu.handle):
            try:
                uuid = self._library.nvmlDeviceGetUUID(handle)
                name = self._library.nvmlDeviceGetName(handle)
            except self._library.NVMLError as error:
                is_never(error)
                continue  # it was there a moment ago
            index = f"{gpu.facts.gpu}.{number}"
            shown = before.pop(uuid, None)
            if shown is None or shown.facts.gpu != index:
                profile = name.partition(" MIG ")[2]
                facts = replace(gpu.facts, gpu=index, uuid=uuid, name=name, mig_profile=profile)
                if shown is not None:
                    shown.close()
                shown = _Shown(facts, now)
                shown.device = Instance(self._library, handle, gpu.handle)
            gpu.instances[uuid] = shown
        for gone in before.values():
            gone.close()

    def _instances(self, handle: Any) -> Iterator[tuple[int, Any]]:
        library = self._library
        try:
            enabled, _ = library.nvmlDeviceGetMigMode(handle)
            count = library.nvmlDeviceGetMaxMigDeviceCount(handle) if enabled else 0
        except library.NVMLError as error:
            is_never(error)
            return
        for number in range(count):
            try:
                yield number, library.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            except library.NVMLError as error:
                is_never(error)  # there is none of this number
