"""A device whose copies land when a test says, and the tensors on it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from trackagent.client.device import WIDTH


class DeviceTensor:
    """As much of a torch tensor on a GPU as `log()` looks at. What would wait for the GPU fails."""

    is_cuda = True
    is_cpu = False

    def __init__(self, value: float, device: str = "cuda:0", shape: tuple[int, ...] = ()) -> None:
        self.value = value
        self.device = device
        self.shape = shape
        self.dtype = "float32"

    def numel(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    def is_complex(self) -> bool:
        return False

    def __repr__(self) -> str:
        raise AssertionError("the GPU was waited for")

    __float__ = __index__ = __int__ = item = __repr__


class Copy(NamedTuple):
    """One copy that was queued."""

    words: memoryview
    row: int
    values: list[float]

    def land(self) -> None:
        for column in range(len(self.values)):
            self.land_one(column)

    def land_one(self, column: int) -> None:
        [word] = struct.unpack("=Q", struct.pack("=d", self.values[column]))
        self.words[self.row * WIDTH + column] = word


class FakeMemory:
    def __init__(self, owner: FakeDevices, size: int) -> None:
        self.words = memoryview(bytearray(8 * size)).cast("Q")
        self._owner = owner

    def gather(self, tensors: Sequence[Any]) -> list[float]:
        self._owner.on_gather()
        return [tensor.value for tensor in tensors]

    def send(self, row: int, gathered: list[float]) -> None:
        self._owner.copies.append(Copy(self.words, row, gathered))
        self._owner.on_send()


class FakeDevices:
    """An Accelerator. `copies`: those that have not landed. `on_...`: what happens at a call, for faults."""

    def __init__(self) -> None:
        self.copies: list[Copy] = []
        self.capturing = False
        self.allocated: list[str] = []
        self.on_allocate: Callable[[], None] = lambda: None
        self.on_gather: Callable[[], None] = lambda: None
        self.on_send: Callable[[], None] = lambda: None

    def is_capturing(self, device: str) -> bool:
        return self.capturing

    def allocate(self, device: str, rows: int, width: int) -> FakeMemory:
        self.on_allocate()
        self.allocated.append(device)
        return FakeMemory(self, rows * width)

    def land(self, which: int = 0) -> None:
        """Lands one of the copies, the oldest unless said otherwise."""
        self.copies.pop(which).land()

    def land_all(self) -> None:
        while self.copies:
            self.land()


def fail(error: BaseException) -> Callable[[], None]:
    """What raises the error whenever it is called."""

    def raise_it() -> None:
        raise error

    return raise_it
