"""What is sampled becomes records in the spool, once, and as the same source after the agent began anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.agent.collect.sampled import here, stored
from tests.agent.samples import losses, producer
from tests.agent.spools import ID
from trackagent.agent.collect import recorder as recorder_module
from trackagent.agent.collect.contract import Sample
from trackagent.agent.collect.recorder import FULL, SLOW, Recorder
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import node_run_id
from trackagent.client import record

SECOND = 10**9
T = 1_700_000_000
CPU = "system/cpu/percent"


def recorder(spool: Spool, node: str = "a", **options: Any) -> Recorder:
    """One that holds nothing back."""
    return Recorder(spool, node, **{"hold_s": 0.0, **options})


def cpu(percent: float) -> Sample:
    return Sample({CPU: percent})


def test_a_sample_is_a_point_of_its_node_at_its_second(opened: Spool) -> None:
    recorder(opened).record(T * SECOND + 7, [cpu(12.5)])
    assert stored(opened).values == {("node a", CPU): [(T, 12.5)]}


def test_its_producer_says_that_it_is_sampled_and_where(opened: Spool) -> None:
    recorder(opened).record(T * SECOND, [cpu(1.0), Sample({"gpu/power": 2.0}, gpu="0.1")])
    found = [(info.sampled, info.run_id, info.node) for info in here(opened) if info.sampled]
    assert found == [("node a", node_run_id("a"), "a"), ("gpu a:0.1", node_run_id("a"), "a")]


def test_what_is_sampled_of_a_rank_stands_in_its_run(opened: Spool) -> None:
    rank = producer(3, attempt=2)
    recorder(opened).record(T * SECOND, [Sample({"process/threads": 4.0}, rank=rank)])
    (info,) = (one for one in here(opened) if one.sampled)
    assert (info.sampled, info.run_id, info.attempt, info.rank) == ("rank 3", rank.run_id, 2, 3)
    assert info.producer_id != rank.producer_id


def test_collectors_of_one_source_have_one_producer(opened: Spool) -> None:
    samples = recorder(opened)
    samples.record(T * SECOND, [cpu(1.0)])
    samples.record(T * SECOND, [Sample({"cgroup/memory/current_bytes": 2.0})])
    assert len([info for info in here(opened) if info.sampled]) == 1
    assert set(stored(opened).values) == {
        ("node a", CPU),
        ("node a", "cgroup/memory/current_bytes"),
    }


def test_the_next_agent_goes_on_with_the_same_producer(opened: Spool) -> None:
    recorder(opened).record(T * SECOND, [cpu(1.0)])
    recorder(opened).record((T + 1) * SECOND, [cpu(2.0)])
    assert len([info for info in here(opened) if info.sampled]) == 1
    assert stored(opened).values == {("node a", CPU): [(T, 1.0), (T + 1, 2.0)]}


def test_the_next_agent_may_sample_something_else(opened: Spool) -> None:
    recorder(opened).record(T * SECOND, [cpu(1.0)])
    recorder(opened).record((T + 1) * SECOND, [Sample({"other": 2.0})])
    recorder(opened).record((T + 2) * SECOND, [cpu(3.0)])
    assert stored(opened).values == {
        ("node a", CPU): [(T, 1.0), (T + 2, 3.0)],
        ("node a", "other"): [(T + 1, 2.0)],
    }


def test_more_key_sets_than_there_are_schema_ids_are_kept_too(opened: Spool) -> None:
    samples = recorder(opened)
    sets = record.MAX_SCHEMAS + 5
    for number in range(sets):
        samples.record(T * SECOND, [Sample({f"key{number}": float(number)})])
        opened.committed(ID).result()  # a moment of the disk's: no more is under way than may be
    found = stored(opened).values
    assert found == {("node a", f"key{n}"): [(T, float(n))] for n in range(sets)}


def test_a_sample_without_readings_is_none(opened: Spool) -> None:
    recorder(opened).record(T * SECOND, [Sample({})])
    assert [info for info in here(opened) if info.sampled] == []


def test_what_a_full_spool_does_not_take_is_counted(open_spool: Callable[..., Spool]) -> None:
    spool = open_spool(max_bytes=4096)
    spool.add_sink("store").result()
    spool.open_producer(producer(), {}).result()
    spool.append(ID, 0, 0, losses(range(80))).result()
    samples = recorder(spool)
    for second in range(2):
        samples.record((T + second) * SECOND, [Sample({f"key{n}": 1.0 for n in range(50)})])
    delivery = spool.next_delivery("store", 1 << 30).result()
    assert delivery is not None
    spool.delivered("store", delivery.id.last).result()
    samples.record((T + 2) * SECOND, [Sample({"key": 1.0})])
    spool.committed(ID).result()  # what told of the loss was appended before this
    spool.committed(ID).result()
    batch = stored(spool)
    assert batch.values == {("node a", "key"): [(T + 2, 1.0)]}
    assert [(one.reason, one.records, one.more) for one in batch.losses] == [(FULL, 2, True)]


def test_what_is_sampled_of_a_rank_ends_when_the_rank_has(opened: Spool) -> None:
    samples = recorder(opened)
    samples.record(T * SECOND, [cpu(1.0), Sample({"process/threads": 4.0}, rank=producer())])
    samples.end_others(here(opened))
    assert [info.sampled for info in here(opened)] == ["", "node a", "rank 0"]
    opened.end_producer(ID).result()
    samples.end_others(here(opened))
    assert [info.sampled for info in here(opened)] == ["node a"]


def test_what_an_earlier_agent_sampled_of_a_rank_that_ended_meanwhile_ends(opened: Spool) -> None:
    recorder(opened).record(T * SECOND, [Sample({"process/threads": 4.0}, rank=producer())])
    opened.end_producer(ID).result()
    recorder(opened).end_others(here(opened))
    assert here(opened) == []


def test_what_an_agent_of_another_name_sampled_ends(opened: Spool) -> None:
    recorder(opened, "b").record(T * SECOND, [cpu(1.0)])
    recorder(opened).end_others(here(opened))
    assert here(opened) == [producer()]


def test_a_producer_is_claimed_before_it_is_made_known(opened: Spool) -> None:
    claimed: list[tuple[str, bytes]] = []

    def claim(run_id: str, producer_id: bytes) -> None:
        assert producer_id not in {info.producer_id for info in here(opened)}
        claimed.append((run_id, producer_id))

    recorder(opened, claim=claim).record(T * SECOND, [cpu(1.0)])
    assert [run_id for run_id, _ in claimed] == [node_run_id("a")]


# --- held, to be kept together


def holding(spool: Spool) -> Recorder:
    samples = Recorder(spool, "a", hold_s=3600.0)
    samples.record(T * SECOND, [cpu(0.0)])
    samples.record((T + 1) * SECOND, [cpu(1.0)])
    samples.record((T + 2) * SECOND, [cpu(2.0)])
    return samples


def test_the_first_sample_of_a_source_is_kept_at_once(opened: Spool) -> None:
    holding(opened)
    assert stored(opened).values == {("node a", CPU): [(T, 0.0)]}


def test_later_ones_are_kept_together(opened: Spool) -> None:
    holding(opened).send_due(all_held=True)
    delivery = opened.next_delivery("store", 1 << 30).result()
    assert delivery is not None
    assert len(delivery.batches) == 2
    assert stored(opened).values == {("node a", CPU): [(T, 0.0), (T + 1, 1.0), (T + 2, 2.0)]}


def test_what_is_not_due_is_held(opened: Spool) -> None:
    holding(opened).send_due()
    assert stored(opened).values == {("node a", CPU): [(T, 0.0)]}


def test_what_is_held_of_a_rank_is_kept_when_it_ends(opened: Spool) -> None:
    samples = Recorder(opened, "a", hold_s=3600.0)
    for second in range(3):
        of_rank = Sample({"process/threads": float(second)}, rank=producer())
        samples.record((T + second) * SECOND, [of_rank])
    opened.end_producer(ID).result()
    samples.end_others(here(opened))
    assert len(stored(opened).values["rank 0", "process/threads"]) == 3


def test_what_is_held_is_bounded(opened: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MAX_HELD_BYTES", 100)
    samples = Recorder(opened, "a", hold_s=3600.0)
    for second in range(8):
        samples.record((T + second) * SECOND, [cpu(1.0)])
    samples.send_due(all_held=True)
    opened.committed(ID).result()
    opened.committed(ID).result()
    sink = stored(opened)
    (kept,) = sink.values.values()
    assert [(loss.reason, loss.records) for loss in sink.losses] == [(SLOW, 8 - len(kept))]
    assert 1 < len(kept) < 8
