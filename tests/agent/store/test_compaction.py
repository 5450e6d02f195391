"""Which chunks are merged: decisions on sizes alone, and that all ways end in few, large chunks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trackagent.agent.store.chunks import BLOCK_POINTS, FULL, Chunk
from trackagent.agent.store.compaction import FAN_IN, MOST_PARTS, Merge, plan

CAPACITY = 65_536


def parts(*sizes: int, level: int = 0) -> list[Chunk]:
    """Chunks of these sizes one after another; as in the database, large ones are packed."""
    found: list[Chunk] = []
    start = 0
    for n in sizes:
        found.append(chunk(start, n, level))
        start += n
    return found


def chunk(start: int, n: int, level: int, *, packed: bool = False) -> Chunk:
    block = None if packed or n >= BLOCK_POINTS else b"\x01"
    return Chunk(start, start, n, level, increasing=True, keys=1, block=block)


def merged(before: list[Chunk], merge: Merge, *, final: bool) -> list[Chunk]:
    made = []
    start = before[merge.first].start
    for n, level in merge.pieces:
        made.append(chunk(start, n, level, packed=final))
        start += n
    after = before[: merge.first] + made + before[merge.last :]
    return [part for part in after if part.level != FULL]


def settled(before: list[Chunk], *, final: bool = False) -> list[Chunk]:
    for _ in range(10_000):
        merge = plan(before, CAPACITY, final=final)
        if merge is None:
            return before
        before = merged(before, merge, final=final)
    raise AssertionError("merging does not come to an end")


def test_few_chunks_stay_as_they_are() -> None:
    assert plan(parts(*[200] * (FAN_IN - 1)), CAPACITY, final=False) is None


def test_enough_small_chunks_become_one_of_the_next_level() -> None:
    assert plan(parts(*[200] * FAN_IN), CAPACITY, final=False) == Merge(0, 16, ((3200, 1),))


def test_a_full_chunk_is_cut_off_and_the_rest_keeps_its_level() -> None:
    expected = Merge(0, 3, ((CAPACITY, FULL), (90_000 - CAPACITY, 2)))
    assert plan(parts(30_000, 30_000, 30_000, 30_000, level=2), CAPACITY, final=False) == expected


def test_chunks_that_fill_one_exactly_leave_no_rest() -> None:
    expected = Merge(0, 2, ((CAPACITY, FULL),))
    assert plan(parts(CAPACITY // 2, CAPACITY // 2), CAPACITY, final=False) == expected


def test_chunks_of_middle_size_wait_until_they_fill_one() -> None:
    assert plan(parts(*[3200] * 20, level=1), CAPACITY, final=False) is None


def test_no_level_grows_beyond_its_bound() -> None:
    wide = parts(*[3] * MOST_PARTS, level=3)
    assert plan(wide, capacity := 1000, final=False) == Merge(0, MOST_PARTS, ((192, 4),)), capacity


def test_levels_are_not_mixed() -> None:
    older, newer = parts(*[200] * 10, level=1), parts(*[200] * 10)
    moved = [chunk(part.start + 2000, part.n, part.level) for part in newer]
    assert plan(older + moved, CAPACITY, final=False) is None


def test_chunks_are_not_merged_across_a_gap() -> None:
    before = parts(*[200] * FAN_IN)
    del before[8]
    assert plan(before, CAPACITY, final=True) == Merge(0, 8, ((1600, 1),))


def test_what_is_left_of_an_ended_producer_becomes_one_chunk() -> None:
    before = [chunk(0, 3200, 1), chunk(3200, 200, 0), chunk(3400, 200, 0)]
    assert plan(before, CAPACITY, final=True) == Merge(0, 3, ((3600, 2),))


def test_a_single_packed_chunk_of_an_ended_producer_is_left_alone() -> None:
    assert plan([chunk(0, 100, 3, packed=True)], CAPACITY, final=True) is None


@given(st.lists(st.integers(1, 70_000), max_size=200), st.booleans())
def test_merging_comes_to_an_end_with_few_chunks(sizes: list[int], final: bool) -> None:
    left = settled(parts(*sizes), final=final)
    most = 1 if final else MOST_PARTS * 4
    assert len(left) <= most


@given(st.lists(st.integers(1, 3000), max_size=300))
def test_a_value_is_merged_a_few_times_in_its_life(sizes: list[int]) -> None:
    now: list[Chunk] = []
    moved, start = 0, 0
    for n in sizes:
        now.append(chunk(start, n, 0))
        start += n
        while merge := plan(now, CAPACITY, final=False):
            moved += sum(part.n for part in now[merge.first : merge.last])
            now = merged(now, merge, final=False)
    assert moved <= 4 * sum(sizes)
