"""What every store does with what agents sample: it is seen by runs, and makes and changes none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.agent.store.batches import (
    OTHER_RUN,
    RUN,
    batch,
    end,
    event,
    loss,
    points,
    producer,
)
from tests.agent.store.contract.stores import (
    FORKED,
    R0,
    R1,
    OpenStore,
    astuple,
    everything,
    summary,
)
from trackagent.agent.store.contract import (
    NotFound,
    Points,
    ProducerInfo,
    Reader,
    SeriesInfo,
    Writer,
    node_run_id,
)

SECOND_NS = 1_000_000_000
NODE_RUN = node_run_id("node-a")


def at_second(second: float, rank: int = 0, **changes: Any) -> ProducerInfo:
    """A rank that began then."""
    return producer(rank, **({"start_time_ns": int(second * SECOND_NS)} | changes))


def of_node(node: str = "node-a", source: str = "", number: int = 0) -> ProducerInfo:
    """An agent that samples a node, or what is on it."""
    return producer(
        run=node_run_id(node),
        sampled=source or f"node {node}",
        producer_id=f"{node} {source} {number}".encode(),
        node=node,
        experiment="samples",
        run_name="nobody's",
        world_size=9,
        attempt=7,
        start_time_ns=1,
    )


def of_rank(rank: int = 0, *, number: int = 0, **changes: Any) -> ProducerInfo:
    """An agent that samples a process of the run."""
    return producer(
        rank,
        **({"sampled": f"rank {rank}", "producer_id": f"eye {rank} {number}".encode()} | changes),
    )


def sampled(by: ProducerInfo, seconds: Any, *keys: str, **values: Any) -> Points:
    return points(
        by,
        seconds,
        times=[second * SECOND_NS for second in seconds],
        keys=keys or ("cpu",),
        **values,
    )


NODE = of_node()
EYE = of_rank()


def names(infos: list[SeriesInfo]) -> list[tuple[str, str]]:
    return [(info.key, info.source) for info in infos]


def steps(reader: Reader, source: str, key: str = "cpu", run: str = RUN) -> list[int]:
    found: list[int] = reader.series(run, key, source).steps.tolist()
    return found


# --- they make no run ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latest", NODE_RUN, NODE_RUN[:6], "nobody's", NODE_RUN[:8], ""])
def test_samples_of_a_node_are_no_run_and_no_candidate(
    writer: Writer, reader: Reader, name: str
) -> None:
    writer.write(batch(1, NODE, points=[sampled(NODE, [1])], ends=[end(NODE)]))
    assert reader.runs() == reader.runs(experiment="samples") == []
    with pytest.raises(NotFound) as caught:
        reader.run(name)
    assert NODE_RUN not in str(caught.value).replace(repr(name), "")


def test_a_run_that_is_sampled_only_is_not_listed(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, EYE, points=[sampled(EYE, [1])]))
    assert reader.runs() == []
    with pytest.raises(NotFound):
        reader.run(RUN)


def test_it_is_listed_as_what_it_is_when_a_rank_comes(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, EYE, points=[sampled(EYE, [1])], ends=[end(EYE, "failed", error="no")]))
    writer.write(batch(2, at_second(5, run_name="named", experiment="gpt")))
    (run,) = reader.runs(experiment="gpt", status="running")
    assert (run.name, run.attempt, run.ranks, run.start_time_ns) == ("named", 1, 1, 5 * SECOND_NS)
    assert reader.run("named") == reader.run("latest") == run


# None of what these say of themselves may be taken for the run's.
FIRST = of_rank(0, start_time_ns=1, world_size=64, run_name="x", experiment="y", attempt=9)
LAST = of_rank(5, start_time_ns=10**18)
SAID = [
    batch(
        1,
        R0,
        R1,
        points=[points(R0, range(10))],
        metric_records={R0.producer_id: 10},
        losses=[loss(R0, "full", 2)],
    ),
    batch(2, R0, R1, ends=[end(R0, logged=10), end(R1, "failed", error="boom", time_ns=8)]),
]
SAMPLES = [
    batch(
        1,
        FIRST,
        points=[sampled(FIRST, range(5), "rss", "loss", "cpu")],
        metric_records={FIRST.producer_id: 5},
        losses=[loss(FIRST, "full", 70)],
        origin="samples",
    ),
    batch(2, LAST, points=[sampled(LAST, [3], "rss")], origin="samples"),
    batch(3, NODE, points=[sampled(NODE, range(5))], origin="samples"),
    batch(4, FIRST, ends=[end(FIRST, "killed", time_ns=10**18)], origin="samples"),
]


@pytest.mark.parametrize("seed", range(6))
def test_samples_change_nothing_that_is_said_of_a_run(open_store: OpenStore, seed: int) -> None:
    without, sampled_too = open_store(), open_store()
    for one in SAID:
        without[0].write(one)
    every = [*SAID, *SAMPLES]
    for at in np.random.default_rng(seed).permutation(len(every)):
        sampled_too[0].write(every[at])
    assert everything(sampled_too[1]) == everything(without[1])
    assert sampled_too[1].attempts(RUN) == without[1].attempts(RUN)


def test_losses_of_samples_are_counted_all_the_same(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, R0, NODE, losses=[loss(R0, "full", 1), loss(NODE, "full", 2)]))
    assert (reader.all_losses(), summary(reader).lost_records) == ({"full": 3}, 1)


# --- what a run sees -------------------------------------------------------------------------------


def test_a_run_sees_the_samples_of_its_nodes_and_ranks(writer: Writer, reader: Reader) -> None:
    gpu, elsewhere = of_node(source="gpu node-a:0"), of_node("node-b")
    said = [sampled(one, [10], "b", "a") for one in (NODE, gpu, elsewhere, EYE)]
    writer.write(batch(1, at_second(10), NODE, gpu, elsewhere, EYE, points=said))
    assert names(reader.samples_list(RUN)) == [
        (key, source) for key in "ab" for source in ("gpu node-a:0", "node node-a", "rank 0")
    ]
    assert reader.series_list(RUN) == []


def test_a_run_on_two_nodes_sees_both(writer: Writer, reader: Reader) -> None:
    other = of_node("node-b")
    ranks = [at_second(10), at_second(20, 1, node="node-b")]
    said = [sampled(one, range(40)) for one in (NODE, other)]
    writer.write(
        batch(1, *ranks, NODE, other, points=said, ends=[end(ranks[0], time_ns=13 * SECOND_NS)])
    )
    assert steps(reader, "node node-a") == [0, 1, 2, 3]
    assert steps(reader, "node node-b") == [*range(10, 30)]


def test_samples_of_a_node_are_kept_once_for_all_its_runs(writer: Writer, reader: Reader) -> None:
    one, other = at_second(3.9), at_second(5.2, run=OTHER_RUN)
    writer.write(batch(1, one, other, NODE, points=[sampled(NODE, range(10))]))
    writer.write(batch(2, ends=[end(one, time_ns=6 * SECOND_NS - 1)]))
    assert reader.series(RUN, "cpu", "node node-a").values.tolist() == [3, 4, 5]
    assert reader.series(OTHER_RUN, "cpu", "node node-a").values.tolist() == [5, 6, 7, 8, 9]
    assert steps(reader, "node node-a", run=OTHER_RUN) == [0, 1, 2, 3, 4]


def test_a_listed_sample_says_what_the_run_sees_of_it(writer: Writer, reader: Reader) -> None:
    rank = at_second(4)
    said = [sampled(NODE, range(10), "cpu", "load"), sampled(NODE, range(6, 9), "cpu")]
    writer.write(batch(1, rank, NODE, points=said, ends=[end(rank, time_ns=7 * SECOND_NS)]))
    infos = reader.samples_list(RUN)
    assert [astuple(info) for info in infos] == [
        ("cpu", "node node-a", 6, 0, 3),
        ("load", "node node-a", 4, 0, 3),
    ]
    assert [info.last_value for info in infos] == [7, 7.1]


def test_the_times_of_samples_stay(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, at_second(4), NODE, points=[sampled(NODE, [5, 6])]))
    times = reader.series(RUN, "cpu", "node node-a").times_ns
    assert times.tolist() == [5 * SECOND_NS, 6 * SECOND_NS]


def test_samples_of_a_rank_are_the_run_s_whenever_they_were_taken(
    writer: Writer, reader: Reader
) -> None:
    writer.write(batch(1, at_second(4), EYE, points=[sampled(EYE, [3, 9])]))
    assert steps(reader, "rank 0") == [-1, 5]


def test_a_run_that_goes_on_sees_what_comes(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, at_second(4), NODE, points=[sampled(NODE, range(6))]))
    writer.write(batch(2, points=[sampled(NODE, range(6, 9))]))
    assert steps(reader, "node node-a") == [0, 1, 2, 3, 4]


def test_a_run_s_time_on_a_node_is_that_of_all_its_attempts(writer: Writer, reader: Reader) -> None:
    first, last = at_second(2), at_second(8, attempt=2)
    ends = [end(first, "failed", time_ns=3 * SECOND_NS), end(last, time_ns=9 * SECOND_NS)]
    writer.write(batch(1, first, last, NODE, points=[sampled(NODE, range(12))], ends=ends))
    assert steps(reader, "node node-a") == [*range(8)]


def test_what_a_rank_forked_does_not_keep_a_node_in_a_run(writer: Writer, reader: Reader) -> None:
    rank = at_second(2)
    said = [sampled(NODE, range(12))]
    writer.write(batch(1, rank, FORKED, NODE, points=said, ends=[end(rank, time_ns=4 * SECOND_NS)]))
    assert len(steps(reader, "node node-a")) == 3


def test_nothing_is_seen_of_another_time(writer: Writer, reader: Reader) -> None:
    rank = at_second(100)
    writer.write(batch(1, rank, NODE, points=[sampled(NODE, range(99))]))
    writer.write(batch(2, points=[sampled(NODE, [103])], ends=[end(rank, time_ns=102 * SECOND_NS)]))
    assert reader.samples_list(RUN) == []
    assert list(reader.export(RUN, samples=True)) == []


@pytest.mark.parametrize(("key", "source"), [("cpu", "node node-b"), ("none", "node node-a")])
def test_what_was_never_sampled_is_not_found(
    writer: Writer, reader: Reader, key: str, source: str
) -> None:
    writer.write(batch(1, at_second(1), NODE, points=[sampled(NODE, [1])]))
    with pytest.raises(NotFound):
        reader.series(RUN, key, source)


def test_what_a_rank_logs_goes_before_what_is_sampled_of_it(writer: Writer, reader: Reader) -> None:
    writer.write(
        batch(1, R0, EYE, points=[sampled(EYE, [5], "rss", "cpu"), points(R0, [1], keys=("rss",))])
    )
    assert names(reader.series_list(RUN)) == [("rss", "rank 0")]
    assert names(reader.samples_list(RUN)) == [("cpu", "rank 0")]
    assert steps(reader, "rank 0", "rss") == [1]


def test_samples_of_one_second_are_all_there_whichever_attempt_they_are_of(
    writer: Writer, reader: Reader
) -> None:
    again = of_rank(0, number=2, attempt=2)
    said = [sampled(EYE, [5], value=[1]), sampled(again, [5, 6], value=[2, 3])]
    writer.write(batch(1, at_second(5), EYE, again, points=said))
    assert reader.series(RUN, "cpu", "rank 0").values.tolist() == [1, 2, 3]


def test_samples_are_one_series_over_an_agent_s_restarts(writer: Writer, reader: Reader) -> None:
    later = of_node(number=2)
    writer.write(batch(1, at_second(1), later, points=[sampled(later, [7, 8])]))
    writer.write(batch(2, NODE, points=[sampled(NODE, [5, 6])], ends=[end(NODE)]))
    assert steps(reader, "node node-a") == [4, 5, 6, 7]


def test_samples_are_drawn_in_buckets(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, at_second(100), NODE, points=[sampled(NODE, range(50, 150))]))
    found = reader.buckets(RUN, "cpu", "node node-a", 2)
    assert (found.first_step.tolist(), found.last_step.tolist()) == ([0, 25], [24, 49])
    assert found.mean.tolist() == [112, 137]


def test_a_long_series_of_samples_is_cut_where_the_run_begins_and_ends(
    writer: Writer, reader: Reader
) -> None:
    rank = at_second(1500)
    for number in range(30):
        seconds = range(100 * number, 100 * number + 100)
        writer.write(batch(number, NODE, points=[sampled(NODE, seconds)]))
    writer.write(batch(30, rank, ends=[end(rank, time_ns=1725 * SECOND_NS)]))
    assert steps(reader, "node node-a") == [*range(226)]
    (info,) = reader.samples_list(RUN)
    assert (info.points, info.first_step, info.last_step, info.last_value) == (226, 0, 225, 1725)


def test_samples_out_of_order_are_seen_in_order(writer: Writer, reader: Reader) -> None:
    rank = at_second(4)
    for number, seconds in enumerate(([9, 5, 1], [8, 2, 6], [7, 3, 4])):
        writer.write(batch(number, NODE, points=[sampled(NODE, seconds)]))
    writer.write(batch(3, rank, ends=[end(rank, time_ns=7 * SECOND_NS)]))
    assert steps(reader, "node node-a") == [0, 1, 2, 3]
    assert reader.samples_list(RUN)[0].last_value == 7


def test_under_the_id_of_a_node_all_its_samples_are_found(writer: Writer, reader: Reader) -> None:
    writer.write(batch(1, NODE, points=[sampled(NODE, [5, 6])], events=[event(NODE, "xid")]))
    assert names(reader.samples_list(NODE_RUN)) == [("cpu", "node node-a")]
    assert steps(reader, "node node-a", run=NODE_RUN) == [5, 6]
    assert [one.message for one in reader.events(NODE_RUN)] == ["xid"]


# --- events and exports ----------------------------------------------------------------------------


def test_events_of_a_node_are_those_of_the_runs_that_were_there(
    writer: Writer, reader: Reader
) -> None:
    rank = at_second(4)
    said = [event(NODE, str(at), time_ns=at * SECOND_NS + 5) for at in (9, 3, 4, 6, 7, 8)]
    writer.write(batch(1, rank, NODE, events=[*said, event(rank, "own", time_ns=1)]))
    writer.write(batch(2, ends=[end(rank, time_ns=7 * SECOND_NS)]))
    found = reader.events(RUN)
    assert [(one.message, one.source) for one in found] == [
        ("4", "node node-a"),
        ("6", "node node-a"),
        ("7", "node node-a"),
        ("own", "rank 0"),
    ]
    assert reader.events(RUN, after=found[1].id) == found[2:]


def test_an_export_gives_what_ranks_logged_or_what_was_sampled(
    writer: Writer, reader: Reader
) -> None:
    rank = at_second(4)
    said = [points(rank, [1]), sampled(NODE, [3, 4, 5]), sampled(EYE, [6], "rss")]
    writer.write(batch(1, rank, NODE, EYE, points=said))
    assert [block.keys for block in reader.export(RUN)] == [("loss",)]
    found = {block.source: block for block in reader.export(RUN, samples=True)}
    node, eye = found["node node-a"], found["rank 0"]
    assert (node.keys, node.rank, node.attempt) == (("cpu",), -1, 0)
    assert (node.steps.tolist(), node.values.tolist()) == ([0, 1], [[4, 5]])
    assert node.times_ns.tolist() == [4 * SECOND_NS, 5 * SECOND_NS]
    assert (eye.keys, eye.rank, eye.attempt, eye.steps.tolist()) == (("rss",), 0, 1, [2])


def test_an_export_of_samples_goes_on_where_it_was(writer: Writer, reader: Reader) -> None:
    skip: dict[str, int] = {}
    writer.write(batch(1, at_second(4), NODE, points=[sampled(NODE, [3, 4, 5])]))
    assert [block.steps.tolist() for block in reader.export(RUN, skip=skip, samples=True)] == [
        [0, 1]
    ]
    writer.write(batch(2, points=[sampled(NODE, [6])]))
    assert [block.steps.tolist() for block in reader.export(RUN, skip=skip, samples=True)] == [[2]]
    assert [*reader.export(RUN, skip=skip, samples=True)] == []


def test_samples_of_an_attempt_have_its_number_in_the_run(writer: Writer, reader: Reader) -> None:
    job = 2_000_000_000_000_000_000
    eye = of_rank(number=1, attempt=1, job_time_ns=job + 1)
    writer.write(batch(1, eye, points=[sampled(eye, [5])]))
    for number in (0, 1):
        rank = at_second(number, job_time_ns=job + number, producer_id=b"of a job %d" % number)
        writer.write(batch(2 + number, rank))
    assert [block.attempt for block in reader.export(RUN, samples=True)] == [2]
