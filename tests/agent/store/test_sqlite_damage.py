"""The embedded store with damaged chunks and columns: the rest is read, and what is missing is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.agent.store.batches import RUN, batch, end, points, producer, query, steps_of
from trackagent.agent.store import open_reader, schema
from trackagent.agent.store.chunks import CHUNK_POINTS
from trackagent.agent.store.reader import SqliteReader
from trackagent.agent.store.sqlite import SqliteWriter

R0, R1 = producer(0), producer(1)


def flip(path: Path, table: str, where: str, at: int = -1) -> None:
    """Changes one byte of the data of one row in the file, behind the back of SQLite."""
    ((data,),) = query(path, f"SELECT data FROM {table} WHERE {where}")
    query(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    # A long row lies in many pages, its first bytes in one piece.
    place = content.index(data[:32]) + (at if at >= 0 else min(31, len(data) - 1))
    content[place] ^= 0xFF
    path.write_bytes(content)
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def column(chunk: int, position: int) -> str:
    """The row of `columns` with the steps (0), times (1) or values of a key (2 + its place)."""
    return f"id = {chunk * schema.COLUMNS_PER_CHUNK + position}"


def noise(n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n)


def exported(path: Path) -> dict[tuple[str, str], list[int]]:
    """The steps that an export has, by key and source."""
    found: dict[tuple[str, str], list[int]] = {}
    reader = open_reader(path)
    for block in reader.export(RUN):
        for key in block.keys:
            found.setdefault((key, block.source), []).extend(block.steps.tolist())
    reader.close()
    return found


def damage(path: Path) -> list[str]:
    reader = open_reader(path)
    found = reader.damage(RUN)
    reader.close()
    return found


STEPS_LEFT = [*range(CHUNK_POINTS), *range(2 * CHUNK_POINTS, 150_000)]


@pytest.fixture
def filled(path: Path) -> Path:
    """Two full chunks and a third of two keys, and another rank; the chunks have ids 1 to 4."""
    n = 150_000
    writer = SqliteWriter(path)
    writer.write(
        batch(
            1,
            R0,
            R1,
            points=[points(R0, range(n), keys=("a", "b"), value=noise(n)), points(R1, range(9))],
        )
    )
    writer.close()
    return path


def test_a_series_has_all_but_a_damaged_full_chunk(filled: Path) -> None:
    flip(filled, "columns", column(2, 2))
    assert steps_of(filled, "a") == STEPS_LEFT


def test_a_drawing_has_all_but_a_damaged_full_chunk(filled: Path) -> None:
    flip(filled, "columns", column(2, 2))
    reader = open_reader(filled)
    drawn = reader.buckets(RUN, "a", "rank 0", 100)
    reader.close()
    assert drawn.count.sum() == len(STEPS_LEFT)


def test_a_damaged_column_of_values_costs_no_other_key(filled: Path) -> None:
    flip(filled, "columns", column(2, 2))
    assert steps_of(filled, "b") == list(range(150_000))


def test_an_export_has_all_but_a_damaged_column_of_values(filled: Path) -> None:
    flip(filled, "columns", column(2, 2))
    assert exported(filled) == {
        ("a", "rank 0"): STEPS_LEFT,
        ("b", "rank 0"): list(range(150_000)),
        ("loss", "rank 1"): list(range(9)),
    }


@pytest.mark.parametrize("position", [0, 1])
def test_damaged_steps_or_times_cost_all_keys_of_their_chunk(filled: Path, position: int) -> None:
    flip(filled, "columns", column(2, position))
    assert exported(filled) == {
        ("a", "rank 0"): STEPS_LEFT,
        ("b", "rank 0"): STEPS_LEFT,
        ("loss", "rank 1"): list(range(9)),
    }


def test_a_missing_column_costs_its_key_only(filled: Path) -> None:
    query(filled, f"DELETE FROM columns WHERE {column(2, 3)}")
    assert (steps_of(filled, "a"), steps_of(filled, "b")) == (list(range(150_000)), STEPS_LEFT)


def test_a_damaged_column_of_values_is_named_with_its_key(filled: Path) -> None:
    flip(filled, "columns", column(2, 3))
    expected = "65536 points of b of rank 0 after the first 65536: the checksum does not match"
    assert damage(filled) == [expected]


def test_damaged_steps_are_named_with_all_keys(filled: Path) -> None:
    flip(filled, "columns", column(3, 0))
    expected = "18928 points of a, b of rank 0 after the first 131072: the checksum does not match"
    assert damage(filled) == [expected]


def test_of_many_damaged_keys_a_few_are_named(path: Path, writer: SqliteWriter) -> None:
    keys = tuple(f"k{i}" for i in range(10))
    writer.write(batch(1, R0, points=[points(R0, [5], keys=keys)]))
    flip(path, "chunks", "id = 1")
    expected = "1 point of k0, k1, k2 and 7 more keys of rank 0 after the first 0"
    assert damage(path) == [f"{expected}: the checksum does not match"]


def test_the_rest_of_an_ended_stream_outlives_a_damaged_last_chunk(path: Path) -> None:
    writer = SqliteWriter(path)
    n = CHUNK_POINTS + 100
    for number, at in enumerate(range(0, n, n // 4)):
        steps = range(at, min(at + n // 4, n))
        writer.write(batch(number, R0, points=[points(R0, steps, value=noise(len(steps), number))]))
    writer.write(batch(9, ends=[end(R0)]))
    while writer.compact(60):
        pass
    (last,) = query(path, "SELECT id FROM chunks WHERE n = 100 AND data IS NOT NULL")
    flip(path, "chunks", f"id = {last[0]}")
    writer.compact(60)
    writer.close()
    assert steps_of(path) == list(range(CHUNK_POINTS))


def test_a_series_of_which_all_is_damaged_is_empty(path: Path, writer: SqliteWriter) -> None:
    writer.write(batch(1, R0, points=[points(R0, range(5))], ends=[end(R0)]))
    writer.compact(60)
    flip(path, "chunks", "id = 1")
    assert (steps_of(path), exported(path), len(damage(path))) == ([], {}, 1)


def test_a_cursor_goes_past_a_damaged_chunk(path: Path, writer: SqliteWriter) -> None:
    for number in range(3):
        writer.write(batch(number, R0, points=[points(R0, [number])]))
    flip(path, "chunks", "start = 2")
    reader, cursor = open_reader(path), dict[str, int]()
    list(reader.export(RUN, skip=cursor))
    writer.write(batch(3, R0, points=[points(R0, [3])]))
    found = [block.steps.tolist() for block in reader.export(RUN, skip=cursor)]
    reader.close()
    assert found == [[3]]


@pytest.fixture
def damaged(path: Path, writer: SqliteWriter) -> Path:
    """A store with forty chunks of which one has a changed byte."""
    for number in range(40):
        writer.write(batch(number, R0, points=[points(R0, [number])]))
    flip(path, "chunks", "start = 3", 20)
    return path


def test_a_damaged_chunk_is_left_out_before_it_is_set_aside(damaged: Path) -> None:
    assert steps_of(damaged) == [step for step in range(40) if step != 3]


def test_what_was_set_aside_is_still_named(damaged: Path, writer: SqliteWriter) -> None:
    writer.compact(60)
    expected = "1 point of loss of rank 0 after the first 3: the checksum does not match"
    assert damage(damaged) == [expected]


def test_other_keys_of_what_was_set_aside_can_still_be_read(
    path: Path, writer: SqliteWriter
) -> None:
    said = points(R0, range(2000), keys=("a", "b"), value=noise(2000))
    writer.write(batch(1, R0, points=[said]))
    writer.write(batch(2, R0, points=[points(R0, [2000], keys=("a", "b"))], ends=[end(R0)]))
    flip(path, "columns", column(1, 2))
    writer.compact(60)
    assert query(path, "SELECT level FROM chunks WHERE id = 1") == [(-1,)]
    assert (steps_of(path, "a"), steps_of(path, "b")) == ([2000], list(range(2001)))


def test_merging_sets_a_damaged_chunk_aside_and_keeps_the_rest(
    damaged: Path, writer: SqliteWriter
) -> None:
    writer.compact(60)
    assert steps_of(damaged) == [step for step in range(40) if step != 3]


def test_a_damaged_chunk_is_named_in_the_run(
    damaged: Path, writer: SqliteWriter, reader: SqliteReader
) -> None:
    writer.compact(60)
    (found,) = reader.events(RUN)
    assert (found.level, found.data["points"]) == ("error", 1)
