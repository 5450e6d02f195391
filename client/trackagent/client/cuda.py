"""Values of torch tensors on CUDA (and ROCm) devices, queued for the host.

Everything is queued on the current stream of the tensors' device, behind what computes them. So the tensors
may be freed or overwritten right after: on that stream whoever reuses their memory, torch's allocator too,
comes later (`record_stream` would say nothing new). Who logs on one stream a tensor that another one computes
lets it wait for that one first, and frees the tensor later, as with any use of it.

Nothing here waits for the device. The values become float64 there, in memory of torch's caching allocator,
since a copy that converts on the host would have to wait; and they go to pinned memory, since copies to other
memory are synchronous. As any launch, it takes its turn where the device's queue of launches is full, and the
first of its kind in a process loads the kernel.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any


class Cuda:
    """The torch that has made the tensors."""

    def __init__(self) -> None:
        self._torch: Any = sys.modules["torch"]

    def is_capturing(self, device: Any) -> bool:
        """Whether a CUDA graph is being captured on the device's current stream."""
        if device.type != "cuda":
            return False
        cuda = self._torch.cuda
        if device.index == cuda.current_device():
            return bool(cuda.is_current_stream_capturing())
        with cuda.device(device):
            return bool(cuda.is_current_stream_capturing())

    def allocate(self, device: Any, rows: int, width: int) -> TorchMemory:
        """Pinned memory, 64 KiB a ring; of a CPU plain memory, and its copies land at once."""
        return TorchMemory(self._torch, device, rows, width)


class TorchMemory:
    """Host memory as torch has it."""

    def __init__(self, torch: Any, device: Any, rows: int, width: int) -> None:
        self._torch = torch
        pinned = device.type == "cuda"
        # No tensor of the inference mode in which the first call may be: others could not write to it.
        with torch.inference_mode(False):
            self._host = torch.empty(
                (rows, width), dtype=torch.float64, device="cpu", pin_memory=pinned
            )
        self._rows = self._host.unbind()
        self._singles = self._host[:, 0].unbind()
        # It does not keep the tensor alive: this object has both.
        words = (ctypes.c_uint64 * (rows * width)).from_address(self._host.data_ptr())
        self.words = memoryview(words).cast("B").cast("Q")

    def gather(self, tensors: Sequence[Any]) -> Any:
        """One kernel for all that are of one type, and one more to make them float64. Of a single tensor the
        result has no dimension."""
        torch = self._torch
        # Detached: else the ring would take part in autograd, and keep its graphs.
        plain = [one.detach() if one.requires_grad else one for one in tensors]
        plain = [one.reshape(()) if one.dim() else one for one in plain]
        if len({one.dtype for one in plain}) > 1:
            # Mixed, they would become the widest of their types: float32 for an int64 among them.
            plain = [one.to(torch.float64) for one in plain]
        values = (torch.stack(plain) if len(plain) > 1 else plain[0]).to(torch.float64)
        # RuntimeError of what has no memory, such as a tensor inside of torch.vmap: it would never land.
        values.data_ptr()
        return values

    def send(self, row: int, gathered: Any) -> None:
        """One copy, of whatever number of values."""
        target = self._rows[row][: len(gathered)] if gathered.dim() else self._singles[row]
        target.copy_(gathered, non_blocking=True)
