"""What chaos producers log, and the notes they keep of it on the side, not through the system.

The n-th record of a producer follows from its seed, so the oracle knows every bit of it. A producer notes
`b n` before the call, `r n` when it has returned, `x n` when it was refused, each with one system call, so
that what is noted survives the process.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

INCARNATION_STEPS = 1 << 24
MARK = "chaos"
RUNNING, ENDED, KILLED = "running", "ended", "killed"
_FIRST_TIME_S = 1_500_000_000
_QUIET = 1 << 51
_SPECIAL = (
    0x0000000000000000,  # 0.0
    0x8000000000000000,  # -0.0
    0x7FF0000000000000,  # inf
    0xFFF0000000000000,  # -inf
    0x7FF8000000000000,  # NaN
    0xFFF8000000000123,  # NaN with a sign and a payload
    0x0000000000000001,  # the least subnormal
    0x800FFFFFFFFFFFFF,  # the greatest negative subnormal
    0x0010000000000000,  # the least normal number
    0x7FEFFFFFFFFFFFFF,  # the greatest number
)


@dataclass(frozen=True)
class Producer:
    """One process that logs: the `incarnation`-th of its rank in its run."""

    run_id: str
    rank: int
    incarnation: int
    seed: int

    @property
    def source(self) -> str:
        return f"rank {self.rank}"

    def __str__(self) -> str:
        return f"{self.run_id[:8]} rank {self.rank} process {self.incarnation}"

    def step(self, number: int) -> int:
        return self.incarnation * INCARNATION_STEPS + number


class Metrics(NamedTuple):
    step: int
    bits: Mapping[str, int]  # of the float64 values
    time_s: int | None  # given to log(), in whole seconds


class Text(NamedTuple):
    """A param, a tag or an event."""

    kind: str
    key: str
    text: str
    level: str = "info"
    step: int | None = None


@lru_cache(1 << 15)
def record(producer: Producer, number: int) -> Metrics | Text:
    """What the producer's record `number` is."""
    chance = random.Random(f"{producer.seed}/{number}")
    turn = number % 29
    if turn in (7, 14, 21):
        key = f"{MARK}/{producer.rank}/{producer.incarnation}/{number}"
        text = f"{MARK} {chance.getrandbits(64):x} \u2713 {'x' * chance.choice((0, 3, 700))}"
        kind = {7: "param", 14: "tag", 21: "event"}[turn]
        level = chance.choice(("info", "warning", "error"))
        return Text(kind, key, f"{key} {text}", level, chance.choice((None, number)))
    keys = _keys(number, chance)
    time_s = _FIRST_TIME_S + number if turn == 3 else None
    return Metrics(producer.step(number), {key: _bits(chance) for key in keys}, time_s)


def _keys(number: int, chance: random.Random) -> list[str]:
    if number % 97 == 50:
        return [f"wide/{number % 3}/{i}" for i in range(400)]
    if number % 41 == 20:
        return [f"new/{number // 41}/é {i}" for i in range(3)]
    name, count = chance.choice((("loss", 2), ("loss", 2), ("layer", 10), ("one", 1), ("grad", 40)))
    return [f"{name}/{i}" for i in range(count)]


def _bits(chance: random.Random) -> int:
    if chance.random() < 0.1:
        return chance.choice(_SPECIAL)
    bits = chance.getrandbits(64)
    # A signalling NaN may become a quiet one wherever a floating-point unit touches it.
    return bits | _QUIET if bits & 0x7FF0000000000000 == 0x7FF0000000000000 else bits


def as_float(bits: int) -> float:
    value: float = struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    return value


@dataclass(frozen=True)
class Notes:
    """What a producer noted, with the time of each note (ns, CLOCK_MONOTONIC), and what has become of it."""

    producer: Producer
    begun: Mapping[int, int]
    returned: Mapping[int, int]
    refused: Mapping[int, int]
    state: str = RUNNING

    @property
    def under_way(self) -> set[int]:
        """Records that were begun, and whose call never came back."""
        return self.begun.keys() - self.returned.keys() - self.refused.keys()


def read_notes(producer: Producer, path: Path, state: str = RUNNING) -> Notes:
    """The notes in the file, whose last line may be incomplete; none where there is no file yet."""
    noted: dict[str, dict[int, int]] = {"b": {}, "r": {}, "x": {}}
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for line in lines:
        what, number, time_ns = line.decode().split()
        noted[what][int(number)] = int(time_ns)
    return Notes(producer, noted["b"], noted["r"], noted["x"], state)
