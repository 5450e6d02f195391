"""The damage table of journals: whatever becomes of their bytes, what is not damaged arrives once, to the
bit, and the run says that something is missing."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import pytest

from tests.agent.samples import RUN_ID, TIME_NS, journal, log_losses, losses, producer
from tests.fakes import Folders
from trackagent.agent.decode import decode
from trackagent.agent.orphans import Orphans
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import Batch
from trackagent.client import record
from trackagent.client.folder import LOCK_NAME
from trackagent.client.record import Kind
from trackagent.client.segment import ACKNOWLEDGED_AT, HEADER_BYTES, LAST_WORDS_BYTES

ID = producer().producer_id
NAME = ID.hex()
SEGMENT_BYTES = 16 * 1024
STEPS = range(250)
FIXED = 40
METRICS_BYTES = 40
Mutation = Callable[[bytearray], "bytearray | None"]


class Left(NamedTuple):
    """What a dead rank has left: its segments, and which steps each holds."""

    folder: Path
    paths: list[Path]
    steps: list[list[int]]


@pytest.fixture
def left(folders: Folders) -> Left:
    """STEPS in one lane of three segments."""
    target = journal(folders, segment_bytes=SEGMENT_BYTES)
    log_losses(target, STEPS)
    target.close()
    (folder,) = folders.journals()
    held = {path: steps for path in folder.glob("*.seg") if (steps := _steps_in(path))}
    paths = sorted(held, key=lambda path: held[path])
    assert len(paths) == 3
    return Left(folder, paths, [held[path] for path in paths])


def _records(data: bytes) -> list[int]:
    return record.scan(data, HEADER_BYTES).offsets


def _steps_in(path: Path) -> list[int]:
    data = path.read_bytes()
    found = (record.decode(data, at) for at in _records(data))
    return [one.step for one in found if one.kind == Kind.METRICS]


def spooled(spool: Spool) -> Batch | None:
    """All that waits in the spool, decoded."""
    delivery = spool.next_delivery("store", 1 << 40).result()
    return None if delivery is None else decode(delivery, spool.keys)


def arrived(batch: Batch | None) -> list[int]:
    """The steps of all points, after a look at the values that came with them."""
    found: list[int] = []
    for points in () if batch is None else batch.points:
        assert points.keys == ("loss",)
        assert np.array_equal(points.values[0], points.steps.astype(float))
        assert np.array_equal(points.times_ns, points.steps + TIME_NS)
        found += points.steps.tolist()
    return found


def told(batch: Batch | None) -> list[str]:
    """What the run says is missing."""
    events = () if batch is None else batch.events
    return [event.message for event in events if "last_step" not in event.data]


def flip(at: int) -> Mutation:
    def mutate(data: bytearray) -> None:
        data[at] ^= 0x10

    return mutate


def fill(at: int, size: int, octet: int) -> Mutation:
    def mutate(data: bytearray) -> None:
        data[at : at + size] = bytes([octet]) * size

    return mutate


def resealed(**changes: int | bytes) -> Mutation:
    """A header that says something else, with the right checksum."""

    def mutate(data: bytearray) -> None:
        (length,) = struct.unpack_from("<I", data, 36)
        identity = bytes(data[FIXED : FIXED + length])
        identity = changes.get("identity", identity)  # type: ignore[assignment]
        data[FIXED : FIXED + len(identity)] = identity
        struct.pack_into("<I", data, 36, len(identity))
        for name, at, form in (("lane", 20, "<I"), ("base", 24, "<Q"), ("number", 32, "<I")):
            if name in changes:
                struct.pack_into(form, data, at, changes[name])
        struct.pack_into("<I", data, 12, crc32(data[16 : FIXED + len(identity)]))

    return mutate


def identity(**changes: object) -> bytes:
    info = {name: getattr(producer(), name) for name in producer().__slots__}
    return json.dumps({**info, "producer_id": NAME, **changes}).encode()


# --- headers: the segment is set aside, and all others arrive

FIELDS = {
    "magic": 0,
    "version": 8,
    "byte order": 10,
    "checksum": 12,
    "size": 17,
    "lane": 20,
    "base": 25,
    "number": 32,
    "identity length": 36,
    "identity": FIXED + 30,
}
HEADERS: dict[str, Mutation] = {
    **{f"a bit of the {name}": flip(at) for name, at in FIELDS.items()},
    "zeros over the fields": fill(8, FIXED, 0),
    "noise over the fields": fill(0, FIXED, 0xFF),
    "zeros over the page": fill(0, HEADER_BYTES, 0),
    "a newer version": fill(8, 1, 9),
    "the other byte order": lambda data: data.__setitem__(slice(10, 12), b"\xfe\xff"),
    "a sealed lane out of range": resealed(lane=64),
    "a sealed offset out of range": resealed(base=1 << 63),
    "a sealed offset between records": resealed(base=4),
    "a sealed identity of no JSON": resealed(identity=b"{"),
    "a sealed identity of a list": resealed(identity=b"[]"),
    "a sealed identity nested deeply": resealed(identity=b"[" * 3000 + b"]" * 1000),
    "a sealed identity without a rank": resealed(identity=identity(rank=None)),
    "a sealed identity without fields": resealed(identity=b"{}"),
    "a sealed identity of another": resealed(identity=identity(producer_id="00" * 15 + "01")),
    "a sealed identity of a run that is none": resealed(identity=identity(run_id=RUN_ID[1:])),
    "cut off in the header": lambda data: data[:100],
}


# Of the middle segment each kind; of the first and the last, which nothing precedes or follows, a few.
SEGMENTS = [(name, 1) for name in HEADERS] + [
    (name, which)
    for name in ("a bit of the checksum", "zeros over the page", "a sealed identity of no JSON")
    for which in (0, 2)
]


@pytest.mark.parametrize(("name", "which"), SEGMENTS)
def test_a_segment_with_a_damaged_header_is_set_aside(
    spool: Spool, orphans: Orphans, folders: Folders, left: Left, name: str, which: int
) -> None:
    _apply(left.paths[which], HEADERS[name])
    damaged = left.paths[which].read_bytes()
    orphans.look()
    batch = spooled(spool)
    aside = folders.state / "quarantine" / f"{NAME}-{left.paths[which].name}"
    assert (arrived(batch), aside.read_bytes() == damaged, folders.journals()) == (
        [step for step in STEPS if step not in left.steps[which]],
        True,
        [],
    )
    assert batch is not None
    reason = aside.with_suffix(".reason").read_text().strip()
    assert any(reason in message for message in told(batch))
    assert sum(loss.records for loss in batch.losses) >= 1


# --- records: what stands there is lost, and no other

PLACES = {
    "length": 0,
    "length beyond reason": 3,
    "checksum": 4,
    "kind": 8,
    "flags": 9,
    "schema id": 10,
    "count": 12,
    "step": 16,
    "time": 24,
    "value": 32,
}
RECORDS: dict[str, Callable[[int], Mutation]] = {
    **{
        f"a bit of the {name}": lambda at, place=place: flip(at + place)  # type: ignore[misc]
        for name, place in PLACES.items()
    },
    "zeros": lambda at: fill(at, METRICS_BYTES, 0),
    "noise": lambda at: fill(at, METRICS_BYTES, 0xFF),
    "a zeroed length": lambda at: fill(at, 4, 0),
}
WHERE = {"the first record": (0, 1), "one in between": (1, 50), "the last of all": (2, -1)}


@pytest.mark.parametrize(("segment", "number"), WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("damage", RECORDS.values(), ids=RECORDS)
def test_a_damaged_record_costs_no_other(
    spool: Spool,
    orphans: Orphans,
    left: Left,
    segment: int,
    number: int,
    damage: Callable[[int], Mutation],
) -> None:
    at = _records(left.paths[segment].read_bytes())[number]
    lost = record.decode(left.paths[segment].read_bytes(), at).step
    _apply(left.paths[segment], damage(at))
    unpublished = number == -1 and not left.paths[segment].read_bytes()[at : at + 8].strip(b"\0")
    orphans.look()
    batch = spooled(spool)
    assert arrived(batch) == [step for step in STEPS if step != lost]
    # Zeros at the end of all are what a record looks like that was never published.
    assert len(told(batch)) == (0 if unpublished else 1)


def _copied_over(data: bytearray) -> None:
    at = _records(data)[50]
    data[at + METRICS_BYTES : at + 2 * METRICS_BYTES] = data[at : at + METRICS_BYTES]


def _page_copied(data: bytearray) -> None:
    data[HEADER_BYTES + 2048 : HEADER_BYTES + 2560] = data[
        HEADER_BYTES + 1024 : HEADER_BYTES + 1536
    ]


def _inserted(data: bytearray) -> None:
    at = _records(data)[50]
    end = _records(data)[-1] + METRICS_BYTES
    data[at + METRICS_BYTES : end + METRICS_BYTES] = data[at:end]


def _noise_in_the_room(data: bytearray) -> None:
    data[-LAST_WORDS_BYTES:] = b"\xa5" * LAST_WORDS_BYTES


def _schema_gone(data: bytearray) -> None:
    data[HEADER_BYTES + 33] ^= 1


# name: what happens to the middle segment, and how many of its steps may be lost
BLOCKS: dict[str, tuple[Mutation, int]] = {
    "a record written over the next": (_copied_over, 1),
    "a block written over another": (_page_copied, 14),
    "a record there twice": (_inserted, 0),
    "cut off between records": (lambda data: data[: _records(data)[50]], 60),
    "cut off in a record": (lambda data: data[: _records(data)[50] + 20], 60),
    "cut off after the header": (lambda data: data[:HEADER_BYTES], 110),
    "longer than it says": (lambda data: data + bytes(4096), 0),
    "noise after the end": (lambda data: data + b"\xa5" * 4096, 0),
    "noise in the room for last words": (_noise_in_the_room, 0),
    "zeros over many records": (fill(HEADER_BYTES + 1000, 2000, 0), 52),
    "noise over many records": (fill(HEADER_BYTES + 1000, 2000, 0xA5), 52),
    "a damaged schema": (_schema_gone, 0),
    "a bit where nothing stands": (flip(HEADER_BYTES - 100), 0),
    "another number": (resealed(number=0), 0),
}


@pytest.mark.parametrize(("mutate", "most"), BLOCKS.values(), ids=BLOCKS)
def test_damage_between_records_costs_what_stands_there(
    spool: Spool, orphans: Orphans, left: Left, mutate: Mutation, most: int
) -> None:
    _apply(left.paths[1], mutate)
    readable = {*left.steps[0], *_steps_in(left.paths[1]), *left.steps[2]}
    orphans.look()
    batch = spooled(spool)
    found = arrived(batch)
    assert found == sorted(readable)
    assert len(STEPS) - len(found) <= most
    if len(found) < len(STEPS):
        assert told(batch)


# --- what the header says of the past

ACKNOWLEDGED: dict[str, Mutation] = {
    "a bit of the first": flip(ACKNOWLEDGED_AT + 1),
    "a bit of the second": flip(ACKNOWLEDGED_AT + 9),
    "noise in the first": fill(ACKNOWLEDGED_AT, 8, 0xFF),
    "noise in the second": fill(ACKNOWLEDGED_AT + 8, 8, 0xFF),
}


@pytest.mark.parametrize("mutate", ACKNOWLEDGED.values(), ids=ACKNOWLEDGED)
def test_a_damaged_acknowledgement_costs_nothing(
    spool: Spool, orphans: Orphans, left: Left, mutate: Mutation
) -> None:
    _apply(left.paths[0], mutate)
    orphans.look()
    assert arrived(spooled(spool)) == list(STEPS)


# --- files and folders


def _missing(left: Left) -> set[int]:
    left.paths[1].unlink()
    return set(left.steps[1])


def _emptied(left: Left) -> set[int]:
    os.truncate(left.paths[1], 0)
    return set(left.steps[1])


def _replaced_by_the_first(left: Left) -> set[int]:
    shutil.copy(left.paths[0], left.paths[1])
    return set(left.steps[1])


def _a_copy_under_another_name(left: Left) -> set[int]:
    shutil.copy(left.paths[1], left.folder / "77777777.seg")
    return set()


def _a_folder_in_place_of_a_segment(left: Left) -> set[int]:
    left.paths[1].unlink()
    left.paths[1].mkdir()
    return set(left.steps[1])


def _no_lock(left: Left) -> set[int]:
    (left.folder / LOCK_NAME).unlink()
    return set()


def _noise_in_the_lock(left: Left) -> set[int]:
    (left.folder / LOCK_NAME).write_bytes(os.urandom(4096))
    return set()


def _a_folder_in_place_of_the_lock(left: Left) -> set[int]:
    (left.folder / LOCK_NAME).unlink()
    (left.folder / LOCK_NAME).mkdir()
    return set()


FILES = [
    _missing,
    _emptied,
    _replaced_by_the_first,
    _a_copy_under_another_name,
    _a_folder_in_place_of_a_segment,
    _no_lock,
    _noise_in_the_lock,
    _a_folder_in_place_of_the_lock,
]


@pytest.mark.parametrize("damage", FILES, ids=[damage.__name__[1:] for damage in FILES])
def test_what_else_lies_there_arrives(
    spool: Spool,
    orphans: Orphans,
    folders: Folders,
    left: Left,
    damage: Callable[[Left], set[int]],
) -> None:
    lost = damage(left)
    orphans.look()
    batch = spooled(spool)
    assert (arrived(batch), folders.journals()) == (
        [step for step in STEPS if step not in lost],
        [],
    )
    assert bool(told(batch)) == bool(lost)


def test_the_end_of_a_rank_is_noted_when_nothing_of_its_journal_can_be_read(
    spool: Spool, orphans: Orphans, left: Left
) -> None:
    spool.open_producer(producer(), {}).result()
    for path in left.folder.glob("*.seg"):
        _apply(path, fill(0, HEADER_BYTES, 0xFF))
    orphans.look()
    batch = spooled(spool)
    assert batch is not None
    assert [end.status for end in batch.ends] == ["killed"]
    assert len(told(batch)) >= 3


def test_two_segments_of_one_name_are_both_kept_aside(
    spool: Spool, orphans: Orphans, folders: Folders, left: Left
) -> None:
    aside = folders.state / "quarantine" / f"{NAME}-{left.paths[1].name}"
    aside.parent.mkdir(parents=True)
    aside.write_bytes(b"an earlier one")
    _apply(left.paths[1], flip(0))
    damaged = left.paths[1].read_bytes()
    orphans.look()
    second = aside.with_stem(f"{aside.stem}-2")
    assert (aside.read_bytes(), second.read_bytes() == damaged) == (b"an earlier one", True)


# --- batches on their way


BATCH = losses(range(20))
FIRST = len(BATCH) - 20 * 48
ON_THE_WAY: dict[str, tuple[Mutation, set[int]]] = {
    "a bit of a length": (flip(FIRST + 48 * 5), {5}),
    "a bit of a checksum": (flip(FIRST + 48 * 5 + 4), {5}),
    "a bit of a kind": (flip(FIRST + 48 * 5 + 8), {5}),
    "a bit of a schema id": (flip(FIRST + 48 * 5 + 10), {5}),
    "a bit of a value": (flip(FIRST + 48 * 5 + 36), {5}),
    "zeros": (fill(FIRST + 48 * 5, 96, 0), {5, 6}),
    "noise": (fill(FIRST + 48 * 5, 96, 0xFF), {5, 6}),
    "cut off in a record": (lambda data: data[: FIRST + 48 * 5 + 24], set(range(5, 20))),
    "noise at the end": (lambda data: data + b"\xff" * 64, set()),
}


@pytest.mark.parametrize(("mutate", "lost"), ON_THE_WAY.values(), ids=ON_THE_WAY)
def test_a_batch_damaged_on_its_way_costs_what_is_damaged(
    spool: Spool, mutate: Mutation, lost: set[int]
) -> None:
    spool.add_sink("store").result()
    spool.open_producer(producer(), {}).result()
    data = bytearray(BATCH)
    changed = mutate(data)
    spool.append(ID, 0, 0, bytes(data if changed is None else changed)).result()
    batch = spooled(spool)
    assert batch is not None
    steps = [int(step) for points in batch.points for step in points.steps]
    assert steps == [step for step in range(20) if step not in lost]
    assert len(told(batch)) == 1
    assert sum(loss.records for loss in batch.losses) >= 1


def _apply(path: Path, mutate: Mutation) -> None:
    data = bytearray(path.read_bytes())
    changed = mutate(data)
    path.write_bytes(data if changed is None else changed)
