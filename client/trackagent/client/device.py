"""Values that a device is still computing, and how they come to the journal without anybody waiting.

A **ring** is host memory that one device writes to: ROWS rows of WIDTH float64. A log call takes rows from a
stack (`list.pop`, atomic, as lanes are taken) and queues, behind the work that computes its values, one copy
into each. Free rows are filled with EMPTY, a NaN that no arithmetic produces, so a value has landed when its
word is another one. Whoever looks reads memory and nothing else: the device's library is called on logging
threads only, and no event is recorded or asked for. A row is free again when all of it has been read.

Nothing waits: where no row is free the record is refused. A device writes whenever it likes, out of step or
never; so rings belong to the process and are never freed, and a row that was given up stays taken until it
has landed. A forked child has no part in its parent's rings.
"""

from __future__ import annotations

import os
import struct
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from trackagent.client.errors import ValueRefused

ROWS = 512
WIDTH = 16
# A quiet NaN. Arithmetic gives the canonical one, or the payload of an operand; a NaN that was widened from
# 32 bits or fewer ends in 29 zeros.
EMPTY = 0x7FFC_5EED_0F1A_B1E5
_HIGH, _LOW = EMPTY >> 32, EMPTY & 0xFFFF_FFFF
_EMPTY_ROW = array("Q", [EMPTY]) * WIDTH


class Memory(Protocol):
    """What one device writes to, and how it is told to."""

    @property
    def words(self) -> memoryview:
        """The host's memory, ROWS × WIDTH unsigned 64-bit words. The device writes each of them at once."""

    def gather(self, tensors: Sequence[Any]) -> Any:
        """Queues on the device's current stream what makes one float64 tensor, on the device, of these of one
        element each. RuntimeError when the device cannot."""

    def send(self, row: int, gathered: Any) -> None:
        """Queues on the same stream the copy of what `gather` returned to the beginning of the row."""


class Accelerator(Protocol):
    """A kind of device. Called on logging threads only; no call may wait for a device."""

    def is_capturing(self, device: Any) -> bool:
        """Whether what is queued now would be recorded, to be run later and again, instead of being run."""

    def allocate(self, device: Any, rows: int, width: int) -> Memory:
        """The memory of a ring. RuntimeError when there is none."""


class Ring:
    """The rows of one device."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.free = list(range(ROWS))[::-1]
        # Copies on their way whose values nobody wants any more.
        self.abandoned: deque[_Part] = deque()
        for row in range(ROWS):
            self._empty(row)

    def read(self, row: int, count: int) -> list[int]:
        """The first `count` words of the row."""
        return self.memory.words[row * WIDTH : row * WIDTH + count].tolist()

    def release(self, row: int) -> None:
        """Makes the row, all of which has landed, free."""
        self._empty(row)
        self.free.append(row)

    def _empty(self, row: int) -> None:
        self.memory.words[row * WIDTH : (row + 1) * WIDTH] = _EMPTY_ROW

    def reclaim(self) -> None:
        """Frees what has landed of what was abandoned. On any thread: each part is one thread's at a time."""
        for _ in range(len(self.abandoned)):
            try:
                part = self.abandoned.popleft()
            except IndexError:
                return
            if part.has_landed():
                self.release(part.row)
            else:
                self.abandoned.append(part)


class Rings:
    """The rings of a process, made at the first use of each device."""

    def __init__(self, accelerator: Callable[[], Accelerator]) -> None:
        self._make = accelerator
        self._accelerator: Accelerator | None = None
        self._rings: dict[Any, Ring] = {}
        self._problems: dict[Any, RuntimeError] = {}
        self._parents: list[dict[Any, Ring]] = []
        _all_rings.add(self)

    def ring(self, device: Any) -> Ring:
        """The device's ring. ValueRefused while a graph is being captured there, or when it cannot be had."""
        if self._accelerator is None:
            self._accelerator = self._make()
        try:
            if self._accelerator.is_capturing(device):
                raise ValueRefused(
                    "graph capture",
                    f"a graph is being captured on {device}, and the copies of logged values would be "
                    "captured with it: log after the capture",
                )
        except RuntimeError as error:
            raise _cannot_copy(device, error) from None
        return self._rings.get(device) or self._add(device, self._accelerator)

    def _add(self, device: Any, accelerator: Accelerator) -> Ring:
        if error := self._problems.get(device):
            raise _cannot_copy(device, error)
        try:
            memory = accelerator.allocate(device, ROWS, WIDTH)
        except RuntimeError as error:
            # Not tried again at each step: that may take long.
            self._problems[device] = error
            raise _cannot_copy(device, error) from None
        return self._rings.setdefault(device, Ring(memory))

    def all(self) -> list[Ring]:
        """Those made so far."""
        return list(self._rings.values())

    def _forget(self) -> None:
        """In a forked child: leaves the parent's rings alone. They are kept, since to free them would call
        the device's library, which does not survive a fork."""
        self._parents.append(self._rings)
        self._rings, self._problems = {}, {}


_all_rings: weakref.WeakSet[Rings] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for one in list(_all_rings):
        one._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


@dataclass(slots=True)
class _Part:
    """One row of a record on its way."""

    ring: Ring
    row: int
    keys: list[str]
    sent: bool = False
    before: list[int] = field(default_factory=list)

    def has_landed(self) -> bool:
        """Whether all values are there, which `before` holds then."""
        words = self.ring.read(self.row, len(self.keys))
        landed = are_whole(words, self.before)
        self.before = words
        return landed


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """One record on its way."""

    step: int
    time_ns: int
    parts: list[_Part]
    beside: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Landed:
    """One record that has come."""

    step: int
    time_ns: int
    values: Mapping[str, float]


class InFlight:
    """What one run has logged and devices are still computing, at most ROWS records a device.

    `queue` on any thread and in signal handlers, `landed` on one thread at a time, `give_up` at any time.
    `wake`: called by `queue` when it is time to look.
    """

    def __init__(self, rings: Rings, wake: Callable[[], None] | None) -> None:
        self._rings = rings
        self._wake = wake
        self._woken = False
        # Whoever takes a record out of it, in one step, is who may free its rows.
        self._waiting: list[_Waiting] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_worth_a_look(self) -> bool:
        """Whether `landed` can find anything, were it only rows that this run or an earlier one gave up."""
        return bool(self._waiting) or any(ring.abandoned for ring in self._rings.all())

    def queue(
        self,
        tensors: Mapping[str, Any],
        *,
        step: int,
        time_ns: int,
        beside: Mapping[str, float] | None = None,
    ) -> None:
        """Queues the copies of a record's values; it comes with those of `beside`, which are known.
        ValueRefused, and nothing of it comes, where a ring is full, a graph is being captured, or a device
        fails."""
        parts: list[_Part] = []
        try:
            self._take_rows(tensors, parts)
            for part in parts:
                gathered = part.ring.memory.gather([tensors[key] for key in part.keys])
                part.sent = True  # from here on it may land
                part.ring.memory.send(part.row, gathered)
        except BaseException as error:  # a signal handler's too
            for part in parts:
                if part.sent:
                    part.ring.abandoned.append(part)
                else:
                    part.ring.free.append(part.row)
            if isinstance(error, RuntimeError):
                raise _cannot_copy(next(iter(tensors.values())).device, error) from None
            raise
        self._waiting.append(_Waiting(step, time_ns, parts, beside or {}))
        if self._wake is not None and not self._woken and self.is_filled(0.5):
            self._woken = True
            self._wake()

    def _take_rows(self, tensors: Mapping[str, Any], parts: list[_Part]) -> None:
        """Adds to `parts` a row for each WIDTH values of a device."""
        devices: dict[Any, list[str]] = {}
        for key, tensor in tensors.items():
            devices.setdefault(tensor.device, []).append(key)
        for device, keys in devices.items():
            ring = self._rings.ring(device)
            for start in range(0, len(keys), WIDTH):
                try:
                    row = ring.free.pop()
                except IndexError:
                    raise ValueRefused(
                        "device ring full",
                        f"{ROWS} rows of values are on their way from {device}, and there is no room for "
                        "more: log less often",
                    ) from None
                parts.append(_Part(ring, row, keys[start : start + WIDTH]))

    def is_filled(self, share: float) -> bool:
        """Whether more than this share of a ring's rows is taken."""
        return any(ROWS - len(ring.free) > share * ROWS for ring in self._rings.all())

    def landed(self, most: int | None = None) -> Iterator[Landed]:
        """Takes the records that have come, of all or of the `most` oldest, in the order of the log calls."""
        for ring in self._rings.all():
            ring.reclaim()
        for one in list(self._waiting)[:most]:
            if all(part.has_landed() for part in one.parts):
                try:
                    self._waiting.remove(one)
                except ValueError:  # given up meanwhile
                    continue
                yield self._take(one)
        if self._woken and not self.is_filled(0.5):
            self._woken = False

    def _take(self, one: _Waiting) -> Landed:
        values: dict[str, float] = {}
        for part in one.parts:
            numbers = struct.unpack(
                f"={len(part.keys)}d", struct.pack(f"={len(part.keys)}Q", *part.before)
            )
            values.update(zip(part.keys, numbers, strict=True))
            part.ring.release(part.row)
        return Landed(one.step, one.time_ns, {**values, **one.beside})

    def give_up(self) -> list[int]:
        """Waits for nothing more: the steps of the records that have not come."""
        steps = []
        for one in list(self._waiting):
            try:
                self._waiting.remove(one)
            except ValueError:  # it has just come
                continue
            steps.append(one.step)
            for part in one.parts:
                part.ring.abandoned.append(part)
        return steps


def are_whole(words: Sequence[int], before: Sequence[int]) -> bool:
    """Whether each of these words is a value. `before`: what they were at the last look, or nothing.

    A word is written at once, but should it ever be seen half written, one half of it is still EMPTY's. A
    value may look so too: it is taken when it was the same at the last look.
    """
    if EMPTY in words:
        return False
    return all(
        (word >> 32 != _HIGH and word & 0xFFFF_FFFF != _LOW) or (before and before[i] == word)
        for i, word in enumerate(words)
    )


def _cannot_copy(device: Any, error: RuntimeError) -> ValueRefused:
    why = str(error).partition("\n")[0][:200]
    problem = f"values cannot be copied from {device} ({why}): log tensor.item()"
    return ValueRefused("device error", problem)


def _cuda() -> Accelerator:
    from trackagent.client.cuda import Cuda

    return Cuda()


# This process's.
rings = Rings(_cuda)
