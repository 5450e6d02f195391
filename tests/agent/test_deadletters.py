"""Dead letters: the batch that a sink cannot take goes aside with its reason, alone, and may come again."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.agent.samples import (
    LOSS_KEYS,
    TIME_NS,
    losses,
    metrics,
    producer,
    schema,
)
from tests.agent.sinks import FakeSink, PickySink
from tests.fakes import DEADLINE_S, wait_until
from trackagent.agent import pipeline as pipeline_module
from trackagent.agent.deadletters import DeadLetter, DeadLetters, discard, found, mark, unreadable
from trackagent.agent.decode import decode
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import BatchId, Rejected

Start = Callable[..., Pipeline]
ID = producer().producer_id


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked letters are looked for at every turn."""
    monkeypatch.setattr(pipeline_module, "RETRY_INTERVAL_S", 0.0)


def append(spool: Spool, *steps: int) -> bytes:
    """One batch with the loss, equal to the step, at these steps; its bytes."""
    data = schema(0, *LOSS_KEYS) + b"".join(metrics(0, step, float(step), 0.5) for step in steps)
    spool.append(ID, 0, spool.committed(ID).result().get(0, 0), data).result()
    return data


def origin(spool: Spool) -> str:
    """What the ids of the sink's batches begin with."""
    return spool.add_sink("fake").result()


def left(spool: Spool) -> int:
    return int(spool.statistics().result()["batches"])


def rejected(spool: Spool) -> int:
    return int(spool.statistics().result()["sinks"][0]["rejected"])


def letters(tmp_path: Path) -> list[DeadLetter]:
    return found(tmp_path / "dead-letters")


def settled(spool: Spool) -> None:
    wait_until(lambda: left(spool) == 0, "everything is delivered or set aside")


# --- only what cannot be taken goes aside


@pytest.mark.parametrize("bad", [(0,), (63,), (31,), (20, 21), (5, 40), tuple(range(64))])
def test_good_neighbours_of_bad_batches_arrive_once(
    spool: Spool, start: Start, tmp_path: Path, bad: tuple[int, ...]
) -> None:
    for step in range(64):
        append(spool, step)
    sink = PickySink(*bad)
    start(sink)
    settled(spool)
    assert sorted(sink.steps) == [step for step in range(64) if step not in bad]
    assert [letter.number for letter in letters(tmp_path)] == [step + 1 for step in bad]
    assert rejected(spool) == len(bad)


def test_a_bad_batch_among_many_costs_few_rejections(spool: Spool, start: Start) -> None:
    for step in range(256):
        append(spool, step)
    sink = PickySink(100)
    start(sink)
    settled(spool)
    rejections = len(sink.tried) - len(sink.accepted)
    assert rejections <= 20


def test_what_is_behind_a_bad_batch_flows_on(spool: Spool, start: Start) -> None:
    sink = PickySink(1)
    start(sink)
    append(spool, 1)
    wait_until(lambda: rejected(spool) == 1)
    append(spool, 2)
    wait_until(lambda: sink.steps == [2])


def test_ranges_that_a_sink_took_never_overlap(spool: Spool, start: Start) -> None:
    for step in range(64):
        append(spool, step)
    sink = PickySink(7, 33, 34, 50)
    start(sink)
    settled(spool)
    ranges = sorted((batch.id.first, batch.id.last) for batch in sink.accepted)
    numbers = [number for first, last in ranges for number in range(first, last + 1)]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("method", ["shorten", "delivered", "next_delivery"])
@pytest.mark.parametrize("committed", [False, True])
def test_faults_of_the_spool_on_the_way_change_nothing(
    spool: Spool,
    start: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    committed: bool,
) -> None:
    """Every second call fails, before or after it was committed."""
    real = getattr(spool, method)
    calls = 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            return real(*arguments, **options)
        failed: Future[None] = Future()
        failed.set_exception(OSError("a fault"))
        if committed:
            real(*arguments, **options).result()
        return failed

    monkeypatch.setattr(pipeline_module, "FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr(spool, method, faulty)
    for step in range(16):
        append(spool, step)
    sink = PickySink(5)
    start(sink)
    settled(spool)
    assert (calls > 2, sorted(sink.steps)) == (True, [s for s in range(16) if s != 5])
    assert ([letter.number for letter in letters(tmp_path)], rejected(spool)) == ([6], 1)
    assert len(sink.messages) == 1


def test_the_next_agent_goes_on_with_the_halved_range(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    spool.add_sink("fake").result()
    for step in range(8):
        append(spool, step)
    whole = spool.next_delivery("fake", 1 << 30).result()
    assert whole is not None
    spool.shorten("fake", 4).result()
    sink = PickySink(1)
    start(sink)
    settled(spool)
    assert [batch.id for batch in sink.tried[:2]] == [
        BatchId(origin(spool), 1, 4),
        BatchId(origin(spool), 1, 2),
    ]
    assert sorted(sink.steps) == [0, 2, 3, 4, 5, 6, 7]


# --- what a letter says


def test_a_letter_says_what_is_needed_to_judge_it(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    data = append(spool, 1, 2)
    start(PickySink(2))
    settled(spool)
    (letter,) = letters(tmp_path)
    assert letter.id == f"{origin(spool)[:12]}-1"
    assert (letter.sink, letter.reason, letter.times) == ("fake", "bad steps [2]", 1)
    assert (letter.producer, letter.lane, letter.first_offset) == (producer(), 0, 0)
    assert (letter.size, letter.records, letter.journal_bytes()) == (len(data), 2, data)
    assert (letter.schemas, letter.marked) == ({0: LOSS_KEYS}, False)


def test_the_run_says_that_records_were_rejected(spool: Spool, start: Start) -> None:
    append(spool, 1, 2)
    sink = PickySink(2)
    start(sink)
    wait_until(lambda: sink.messages)
    assert sink.messages == [
        "sink fake rejects 2 records for good: bad steps [2]; they are kept as dead letter "
        f"{origin(spool)[:12]}-1"
    ]


def test_a_sink_that_rejects_everything_is_told_no_end_of_it(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    append(spool, 1)
    start(FakeSink("fake", *[Rejected("no")] * 100))
    settled(spool)
    assert len(letters(tmp_path)) == 2


def test_a_full_spool_does_not_keep_a_bad_batch_in_it(
    open_spool: Callable[..., Spool], start: Start
) -> None:
    spool = open_spool(max_bytes=len(losses(range(1))))
    spool.open_producer(producer(), {}).result()
    append(spool, 0)
    sink = PickySink(0)
    start(sink, source=spool)
    settled(spool)
    assert len(sink.messages) == 1


def test_a_letter_that_cannot_be_written_keeps_the_batch(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "dead-letters").write_text("in the way")
    pipeline = start(PickySink(1))
    append(spool, 1)
    wait_until(lambda: pipeline.state == "retrying")
    assert left(spool) == 1
    (tmp_path / "dead-letters").unlink()
    settled(spool)
    assert (rejected(spool), len(letters(tmp_path))) == (1, 1)


def test_a_letter_half_written_by_a_dead_agent_is_no_letter(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    half = tmp_path / "dead-letters" / "fake" / f".{origin(spool)[:12]}-1"
    half.mkdir(parents=True)
    (half / "records").write_bytes(b"half")
    start(PickySink(1))
    assert (letters(tmp_path), half.exists()) == ([], False)
    append(spool, 1)
    settled(spool)
    assert len(letters(tmp_path)) == 1


def test_an_unreadable_letter_is_named_and_hides_no_other(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    append(spool, 1)
    append(spool, 2)
    start(PickySink(1, 2))
    settled(spool)
    damaged, intact = letters(tmp_path)
    (damaged.folder / "about.json").write_text("{")
    assert [letter.id for letter in letters(tmp_path)] == [intact.id]
    (problem,) = unreadable(tmp_path / "dead-letters")
    assert str(damaged.folder) in problem


# --- the cap


def test_at_their_cap_the_rejected_batch_stays_and_nothing_is_dropped(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    for step in range(3):
        append(spool, step)
    sink = PickySink(0, 1)
    # Room for one.
    pipeline = start(sink, dead_letter_bytes=20_000)
    wait_until(lambda: pipeline.state == "retrying")
    assert "trackagent dead-letters list" in pipeline.error
    assert [letter.number for letter in letters(tmp_path)] == [1]
    assert (left(spool) >= 2, sink.steps) == (True, [])
    discard(letters(tmp_path)[0])
    settled(spool)
    assert [letter.number for letter in letters(tmp_path)] == [2]
    assert sink.steps == [2]


def test_at_their_cap_letters_may_still_be_delivered_again(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    for step in range(3):
        append(spool, step)
    sink = PickySink(0, 1)
    pipeline = start(sink, dead_letter_bytes=20_000)
    wait_until(lambda: pipeline.state == "retrying")
    sink.bad.clear()
    mark(letters(tmp_path)[0])
    settled(spool)
    wait_until(lambda: sorted(sink.steps) == [0, 1, 2])
    assert letters(tmp_path) == []


# --- delivering again


@pytest.fixture
def kept(spool: Spool, start: Start, tmp_path: Path) -> PickySink:
    """A sink that runs and has rejected step 1 of the steps 0 to 2."""
    for step in range(3):
        append(spool, step)
    sink = PickySink(1)
    start(sink)
    settled(spool)
    return sink


def test_a_marked_letter_is_delivered_once_and_gone(kept: PickySink, tmp_path: Path) -> None:
    (letter,) = letters(tmp_path)
    kept.bad.clear()
    for _ in range(3):
        mark(letter)
    wait_until(lambda: not letters(tmp_path))
    wait_until(lambda: not letter.marked)
    assert sorted(kept.steps) == [0, 1, 2]


def test_a_letter_is_delivered_as_it_was_logged(kept: PickySink, tmp_path: Path) -> None:
    kept.bad.clear()
    mark(letters(tmp_path)[0])
    wait_until(lambda: not letters(tmp_path))
    batch = kept.accepted[-1]
    (points,) = batch.points
    assert (points.keys, points.values.tolist()) == (LOSS_KEYS, [[1.0], [0.5]])
    assert points.times_ns.tolist() == [TIME_NS + 1]
    assert batch.producers == [producer()]


def test_the_run_says_that_a_letter_was_delivered(kept: PickySink, tmp_path: Path) -> None:
    (letter,) = letters(tmp_path)
    kept.bad.clear()
    mark(letter)
    wait_until(lambda: not letters(tmp_path))
    assert kept.messages[-1] == f"dead letter {letter.id} was delivered to sink fake after all"


def test_a_letter_that_the_sink_has_already_is_not_taken_twice(
    kept: PickySink, tmp_path: Path
) -> None:
    """As after a crash between the sink's word and the letter's end."""
    (letter,) = letters(tmp_path)
    kept.ids.add(BatchId(letter.origin, letter.number, letter.number))
    kept.bad.clear()
    mark(letter)
    wait_until(lambda: not letters(tmp_path))
    assert sorted(kept.steps) == [0, 2]


def test_a_letter_rejected_again_stays_with_the_new_reason(kept: PickySink, tmp_path: Path) -> None:
    kept.bad = {1, 99}
    (letter,) = letters(tmp_path)
    mark(letter)
    wait_until(lambda: not letter.marked)
    (again,) = letters(tmp_path)
    assert (again.id, again.times, again.reason) == (letter.id, 2, "bad steps [1]")
    assert again.journal_bytes() == letter.journal_bytes()


def test_a_letter_is_kept_and_marked_while_the_sink_is_down(
    spool: Spool, kept: PickySink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "MAX_BACKOFF_S", 0.01)
    (letter,) = letters(tmp_path)
    kept.bad.clear()
    kept.problems = [OSError("no network")] * 3
    mark(letter)
    wait_until(lambda: not letters(tmp_path))
    assert sorted(kept.steps) == [0, 1, 2]


def test_a_mark_made_without_an_agent_counts_at_the_next_start(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    append(spool, 1)
    pipeline = start(PickySink(1))
    settled(spool)
    pipeline.stop(DEADLINE_S)
    mark(letters(tmp_path)[0])
    sink = PickySink()
    start(sink)
    wait_until(lambda: not letters(tmp_path))
    assert sink.steps == [1]


def test_a_letter_needs_no_spool_to_be_delivered(
    spool: Spool, start: Start, tmp_path: Path
) -> None:
    """Its schema came with an earlier batch, and the spool that had it is gone."""
    append(spool, 1)
    at = spool.committed(ID).result()[0]
    spool.append(ID, 0, at, metrics(0, 2, 2.0, 0.5)).result()
    start(PickySink(2)).stop(DEADLINE_S)
    (letter,) = letters(tmp_path)
    batch = decode(letter.delivery(), letter.keys)
    assert [(part.keys, part.steps.tolist()) for part in batch.points] == [(LOSS_KEYS, [2])]
    assert batch.id == BatchId(origin(spool), 2, 2)


# --- dying on the way


def dies(patch: pytest.MonkeyPatch, owner: object, name: str, when: str) -> None:
    """The next call of a method of `owner` ends its thread as a death would: nothing of ours handles it."""
    real = getattr(owner, name)

    def deadly(*arguments: Any, **options: Any) -> Any:
        patch.undo()
        if when == "after":
            result = real(*arguments, **options)
            if isinstance(result, Future):
                result.result()
        raise SystemExit

    patch.setattr(owner, name, deadly)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["shorten", "delivered", "keep"])
def test_dying_while_a_bad_batch_is_set_aside_loses_and_doubles_nothing(
    spool: Spool, start: Start, tmp_path: Path, name: str, when: str
) -> None:
    for step in range(8):
        append(spool, step)
    sink = PickySink(5)
    with pytest.MonkeyPatch.context() as patch:
        dies(patch, DeadLetters if name == "keep" else spool, name, when)
        start(sink).join(DEADLINE_S)
    start(sink)
    settled(spool)
    assert sorted(sink.steps) == [0, 1, 2, 3, 4, 6, 7]
    assert ([letter.number for letter in letters(tmp_path)], rejected(spool)) == ([6], 1)
    assert len(sink.messages) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["deliver", "remove"])
def test_dying_while_a_letter_is_delivered_again_doubles_nothing(
    spool: Spool, start: Start, tmp_path: Path, name: str, when: str
) -> None:
    for step in range(3):
        append(spool, step)
    sink = PickySink(1)
    pipeline = start(sink)
    settled(spool)
    pipeline.stop(DEADLINE_S)
    sink.bad.clear()
    mark(letters(tmp_path)[0])
    with pytest.MonkeyPatch.context() as patch:
        dies(patch, DeadLetters if name == "remove" else sink, name, when)
        start(sink).join(DEADLINE_S)
    start(sink)
    wait_until(lambda: not letters(tmp_path))
    assert sorted(sink.steps) == [0, 1, 2]
    assert len(sink.messages) == 2
