"""What PyTorch's allocator says of the memory on GPUs, from inside the rank: how much its tensors take, how
much it keeps, and how often it ran short. The sender's thread asks, never the training's.

It reads the allocator's own counters and makes no CUDA call: torch is not imported for it, and CUDA not
initialised. Counting takes the allocator's lock for microseconds; while another thread holds that, as in an
allocation that waits for the driver, Python waits with it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

INTERVAL_S = 1.0
MAX_DEVICES = 64

# The key behind torch/cuda/<device>/, and where it stands in torch.cuda.memory_stats_as_nested_dict().
COUNTERS: dict[str, tuple[str, ...]] = {
    "allocated_bytes": ("allocated_bytes", "all", "current"),
    "max_allocated_bytes": ("allocated_bytes", "all", "peak"),
    "reserved_bytes": ("reserved_bytes", "all", "current"),
    "max_reserved_bytes": ("reserved_bytes", "all", "peak"),
    "inactive_split_bytes": ("inactive_split_bytes", "all", "current"),
    "alloc_retries_total": ("num_alloc_retries",),
    "ooms_total": ("num_ooms",),
}


class TorchMemory:
    """modules: sys.modules; clock: seconds, monotonic. For one thread."""

    def __init__(
        self,
        modules: Mapping[str, Any] = sys.modules,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._modules = modules
        self._clock = clock
        self._due = clock()
        self._off = False
        self._devices: int | None = None

    def read(self) -> dict[str, float]:
        """By key, of each device on which this process has had memory; nothing before a second has passed,
        and while it does not use CUDA. Raises what torch raises, and gives nothing from then on."""
        now = self._clock()
        if self._off or now < self._due:
            return {}
        self._due = now + INTERVAL_S
        # One that is just being imported may lack anything.
        cuda: Any = getattr(self._modules.get("torch"), "cuda", None)
        is_initialized = getattr(cuda, "is_initialized", None)
        try:
            if is_initialized is None or not is_initialized():
                return {}
            # The others' counters are CUDA's: to read them is to call it.
            if cuda.get_allocator_backend() != "native":
                self._off = True
                return {}
            return self._read(cuda.memory_stats_as_nested_dict)
        except BaseException:
            self._off = True
            raise

    def _read(self, stats_of: Callable[[int], Mapping[str, Any]]) -> dict[str, float]:
        found: dict[str, float] = {}
        for device in range(MAX_DEVICES if self._devices is None else self._devices):
            try:
                stats = stats_of(device)
            except RuntimeError:
                # How many there are is learnt so: torch.cuda.device_count() may ask CUDA.
                if self._devices is None and device > 0:
                    self._devices = device
                    break
                raise
            if _at(stats, COUNTERS["max_reserved_bytes"]):
                found |= {
                    f"torch/cuda/{device}/{key}": float(_at(stats, path))
                    for key, path in COUNTERS.items()
                }
        return found


def _at(stats: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        stats = stats[name]
    return stats
