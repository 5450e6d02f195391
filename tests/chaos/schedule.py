"""What goes wrong in a storm, and when: data that follows from a seed. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.steps import AGENT_STEPS

# Faults of one gust never use the same thing: each kind has its victim.
RANK, AGENT, WIRE, DISK, CLOCK = "rank", "agent", "wire", "disk", "clock"
VICTIMS = {
    "rank killed": RANK,
    "rank stopped": RANK,
    "agent killed": AGENT,
    "rank and agent killed": AGENT,
    "agent restarted": AGENT,
    "agent stopped": AGENT,
    "agent dies at a step": AGENT,
    "second agent": AGENT,
    "connection cut": WIRE,
    "connection delayed": WIRE,
    "connection doubles": WIRE,
    "connection reorders": WIRE,
    "acknowledgements dropped": WIRE,
    "state disk full": DISK,
    "memory full": DISK,
    "spool fails": DISK,
    "store fails": DISK,
    "segments fail": DISK,
    "short writes": DISK,
    "clock steps": CLOCK,
}
KINDS = tuple(VICTIMS)
# Those that ranks which only log bring an agent to.
STEPS = tuple(
    step.name
    for step in AGENT_STEPS
    if step.name.startswith(
        ("batches", "a delivery", "a batch", "the sink", "the cursor", "chunks")
    )
)
ERRORS = ("disk I/O error", "database or disk is full")
RUNS, RANKS = 2, 3
BETWEEN_S, RECOVERY_S = (0.1, 0.8), 1.0


@dataclass(frozen=True)
class Fault:
    """`at_s`: seconds after the gust began; `for_s`: how long it lasts; `how`: more, by kind."""

    kind: str
    at_s: float
    for_s: float
    how: str = ""


@dataclass(frozen=True)
class Gust:
    """Faults together. It begins `after_s` seconds after the last one was recovered from."""

    after_s: float
    faults: Sequence[Fault]

    @property
    def lasts_s(self) -> float:
        return max(fault.at_s + fault.for_s for fault in self.faults)


@dataclass(frozen=True)
class Load:
    """One rank of one run: records a second, and whether its segments are small and few."""

    run: int
    rank: int
    per_second: float
    small: bool


@dataclass(frozen=True)
class Schedule:
    seed: int
    seconds: float
    loads: Sequence[Load]
    gusts: Sequence[Gust]


def schedule(seed: int, seconds: float, kinds: Sequence[str] = KINDS) -> Schedule:
    """The storm of this seed: about `seconds` of gusts, with faults of these kinds."""
    chance = random.Random(seed)
    loads = [
        Load(run, rank, 600 if rank == 2 else chance.choice((40, 80, 160)), small=rank != 0)
        for run in range(RUNS)
        for rank in range(RANKS)
    ]
    gusts: list[Gust] = []
    planned_s = 0.0
    # Every kind in turn, in an order of the seed's, before one comes again.
    deck: list[str] = []
    while planned_s < seconds:
        if not deck:
            deck = chance.sample(kinds, len(kinds))
        together = [deck.pop()]
        for _ in range(chance.choice((0, 0, 1, 2))):
            others = [kind for kind in kinds if _apart(kind, together)]
            if others:
                together.append(chance.choice(others))
        faults = [_fault(kind, chance) for kind in together]
        gusts.append(Gust(round(chance.uniform(*BETWEEN_S), 3), faults))
        planned_s += gusts[-1].after_s + gusts[-1].lasts_s + RECOVERY_S
    return Schedule(seed, seconds, loads, gusts)


def _apart(kind: str, others: Sequence[str]) -> bool:
    return VICTIMS[kind] not in {VICTIMS[other] for other in others}


def _fault(kind: str, chance: random.Random) -> Fault:
    at_s, for_s = round(chance.uniform(0, 0.5), 3), round(chance.uniform(0.1, 2.0), 3)
    how = ""
    if kind == "agent dies at a step":
        how = chance.choice(STEPS)
    elif kind in ("spool fails", "store fails"):
        how = f"{chance.choice(('before', 'after'))}: {chance.choice(ERRORS)}"
    elif kind == "clock steps":
        how = str(round(chance.uniform(-48, 48) * 3600))
    elif kind == "segments fail":
        how = chance.choice(("EIO", "ENOSPC"))
    elif kind == "short writes":
        how = str(chance.randrange(33_001, 200_000, 2))  # no file of the agent grows beyond it
    elif kind == "connection delayed":
        how = str(round(chance.uniform(0.05, 0.5), 3))
    elif kind.startswith("rank"):
        how = str(chance.randrange(1 << 16))  # which, of those that live then
    return Fault(kind, at_s, for_s, how)
