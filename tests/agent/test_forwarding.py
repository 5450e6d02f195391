"""From one agent's spool to a hub's store: once, whatever breaks on the way, and only what goes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.agent.leaves import NODE, PIN, TOKEN, HubServer, Leaf, node_samples
from tests.agent.samples import RUN_ID, producer
from tests.agent.spools import OpenSpool
from tests.fakes import DEADLINE_S, wait_until
from trackagent.agent import pipeline as pipeline_module
from trackagent.agent.deadletters import found, mark
from trackagent.agent.sinks.forward import ForwardSink, HubRefused
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import Batch, BatchId
from trackagent.protos.v1 import hub_pb2, hub_pb2_grpc


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    server = HubServer(tmp_path / "hub")
    yield server
    server.close()


@pytest.fixture
def leaf(open_spool: OpenSpool, tmp_path: Path, hub: HubServer) -> Iterator[Leaf]:
    one = Leaf(open_spool(), tmp_path, hub)
    one.forwarding.start()
    yield one
    one.close()


def test_what_is_logged_reaches_the_hub(leaf: Leaf, hub: HubServer) -> None:
    info = leaf.open()
    leaf.log(info, 1, 2, 3)
    wait_until(lambda: hub.steps == [1, 2, 3])
    (batch,) = hub.sink.accepted
    assert [one.run_id for one in batch.producers] == [RUN_ID]
    (pipeline,) = leaf.forwarding.pipelines()
    assert batch.includes[0].origin == leaf.origin(pipeline)


def test_the_range_of_a_batch_arrives_after_all_that_the_batch_carries(hub: HubServer) -> None:
    """A hub that knows the range is not sent the batch again."""

    def connect() -> tuple[str, grpc.Channel]:
        return "hub", grpc.insecure_channel(f"127.0.0.1:{hub.port}")

    other = BatchId("cd" * 16, 7, 9)
    part = hub_pb2.Part(origin=other.origin, first=other.first, last=other.last, content=b"x")
    sink = ForwardSink("upstream", connect, node="rack")
    carried = [(producer(3), part.SerializeToString())]
    own = Batch(BatchId("ab" * 16, 1, 2), [producer(2)], parts=carried)
    hub.answers = [grpc.StatusCode.INTERNAL]
    hub.takes_unanswered = True
    with pytest.raises(HubRefused):
        sink.deliver(own)
    assert (hub.arrived(own.id.origin), hub.arrived(other.origin)) == ([], [(7, 9)])
    sink.deliver(own)
    assert (hub.arrived(own.id.origin), hub.arrived(other.origin)) == ([(1, 2)], [(7, 9)])
    sink.close()


def test_a_hub_says_how_long_to_gather(leaf: Leaf, hub: HubServer) -> None:
    hub.gather_ms = 20_000
    info = leaf.open()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    leaf.log(info, 2)
    leaf.log(info, 3)
    leaf.forwarding.stop(DEADLINE_S)
    wait_until(lambda: hub.steps == [1, 2, 3])
    assert len(hub.requests) == 2


def test_the_runs_token_goes_with_it(leaf: Leaf, hub: HubServer) -> None:
    leaf.log(leaf.open(), 1)
    wait_until(lambda: len(hub.requests) == 1)
    (grant,) = hub.requests[0].grants
    assert (grant.run_id, grant.token) == (RUN_ID, TOKEN)


def test_what_goes_elsewhere_is_not_forwarded(leaf: Leaf, hub: HubServer) -> None:
    stays = producer(7)
    leaf.spool.open_producer(stays, {}).result()
    goes = leaf.open(1)
    leaf.log(stays, 100)
    leaf.log(goes, 1)
    leaf.log(stays, 101)
    leaf.log(goes, 2)
    wait_until(lambda: hub.steps == [1, 2])
    sent = {info.producer_id for one in hub.sink.accepted for info in one.producers}
    assert sent == {goes.producer_id}


def test_samples_of_the_node_go_with_its_runs(leaf: Leaf, hub: HubServer) -> None:
    leaf.log(leaf.open(), 1)
    node = node_samples()
    leaf.spool.open_producer(node, {}).result()
    leaf.log(node, 1_700_000_000)
    wait_until(lambda: hub.steps == [1, 1_700_000_000])


def test_what_others_forward_goes_to_no_hub_of_a_run(leaf: Leaf, hub: HubServer) -> None:
    """Whatever they say their node is."""
    info = leaf.open()
    part = hub_pb2.Part(origin="e" * 32, first=1, last=1, content=b"another agent's")
    id_ = BatchId(part.origin, part.first, part.last)
    leaf.spool.accept(id_, part.SerializeToString(), NODE).result()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    assert part.origin not in {one.origin for request in hub.requests for one in request.parts}


@pytest.mark.parametrize("takes", [False, True])
@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
    ],
)
def test_what_fails_is_sent_again_and_arrives_once(
    leaf: Leaf, hub: HubServer, code: grpc.StatusCode, takes: bool
) -> None:
    hub.answers = [code, code]
    hub.takes_unanswered = takes
    info = leaf.open()
    for step in range(20):
        leaf.log(info, step)
    wait_until(lambda: len(hub.steps) >= 20)
    leaf.forwarding.stop(DEADLINE_S)
    assert sorted(hub.steps) == list(range(20))


def test_a_hub_that_goes_and_comes_back_costs_delay_alone(leaf: Leaf, hub: HubServer) -> None:
    info = leaf.open()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    hub.stop()
    leaf.log(info, 2)
    (pipeline,) = leaf.forwarding.pipelines()
    wait_until(lambda: pipeline.state == "retrying")
    leaf.log(info, 3)
    hub.start()
    wait_until(lambda: hub.steps == [1, 2, 3])


def test_what_a_hub_has_lost_is_told_in_the_run(leaf: Leaf, hub: HubServer) -> None:
    info = leaf.open()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    (pipeline,) = leaf.forwarding.pipelines()
    hub.stop()
    leaf.log(info, 2)
    wait_until(lambda: pipeline.state == "retrying")
    hub.lose_everything()
    wait_until(lambda: hub.steps == [2])
    said = [event for batch in hub.sink.accepted for event in batch.events]
    assert [event.producer_id for event in said] == [info.producer_id]
    assert "does not have any more what it had accepted" in said[0].message
    assert [loss.records for batch in hub.sink.accepted for loss in batch.losses] == [1]


def test_what_was_told_missing_may_still_come(leaf: Leaf, hub: HubServer) -> None:
    """As where an agent on another way still holds it."""
    info = leaf.open()
    for step in range(3):
        leaf.log(info, step)
        wait_until(lambda step=step: hub.steps == [*range(step + 1)])  # type: ignore[misc]
    passed_on = [part for request in hub.requests for part in request.parts]
    (pipeline,) = leaf.forwarding.pipelines()
    hub.stop()
    leaf.log(info, 3)
    wait_until(lambda: pipeline.state == "retrying")
    hub.lose_everything()
    wait_until(lambda: hub.steps == [3])
    request = hub_pb2.ForwardRequest(node="rack", parts=passed_on)
    with grpc.insecure_channel(f"127.0.0.1:{hub.port}") as channel:
        for _ in range(2):
            hub_pb2_grpc.HubStub(channel).Forward(request)
    wait_until(lambda: sorted(hub.steps) == [0, 1, 2, 3])


def test_a_hub_is_told_nothing_of_what_it_was_never_to_get(leaf: Leaf, hub: HubServer) -> None:
    stays, goes = producer(7), leaf.open(1)
    leaf.spool.open_producer(stays, {}).result()
    leaf.log(goes, 1)
    wait_until(lambda: hub.steps == [1])
    (pipeline,) = leaf.forwarding.pipelines()
    for step in range(3):
        leaf.log(stays, step)
        wait_until(lambda: _behind(leaf.spool, pipeline.sink_name) == 0)
    hub.stop()
    leaf.log(goes, 2)
    wait_until(lambda: pipeline.state == "retrying")
    hub.start()
    wait_until(lambda: hub.steps == [1, 2])
    assert not [event for batch in hub.sink.accepted for event in batch.events]


def _behind(spool: Spool, name: str) -> int:
    sinks = spool.statistics().result()["sinks"]
    return next(int(sink["batches_behind"]) for sink in sinks if sink["name"] == name)


def test_a_hub_that_was_away_and_has_everything_is_told_nothing(leaf: Leaf, hub: HubServer) -> None:
    info = leaf.open()
    (pipeline,) = leaf.forwarding.pipelines()
    for step in range(3):
        hub.answers = [grpc.StatusCode.UNAVAILABLE]
        hub.takes_unanswered = True
        leaf.log(info, step)
        wait_until(lambda step=step: step in hub.steps and not hub.answers)  # type: ignore[misc]
    assert pipeline.dead_letters()[0] == 0
    leaf.forwarding.stop(DEADLINE_S)
    assert hub.steps == [0, 1, 2]
    assert not [event for batch in hub.sink.accepted for event in batch.events]


def test_a_hub_that_moved_is_found_by_its_next_address(leaf: Leaf, hub: HubServer) -> None:
    info = leaf.open()
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    hub.stop()
    leaf.log(info, 2)
    hub.port = 0
    hub.start()
    leaf.open(2)
    wait_until(lambda: hub.steps == [1, 2])


def test_what_a_hub_can_never_take_becomes_a_dead_letter(leaf: Leaf, hub: HubServer) -> None:
    hub.answers = [grpc.StatusCode.INVALID_ARGUMENT]
    info = leaf.open()
    leaf.log(info, 1)
    (pipeline,) = leaf.forwarding.pipelines()
    wait_until(lambda: pipeline.dead_letters()[0] == 1)
    leaf.log(info, 2)
    wait_until(lambda: 2 in hub.steps)


@pytest.fixture
def passing_over(leaf: Leaf) -> Callable[[], None]:
    """passing_over(): the hub's sink gets past a batch that is not for the hub."""
    stays = producer(7)
    leaf.spool.open_producer(stays, {}).result()

    def one() -> None:
        leaf.log(stays, 0)
        (pipeline,) = leaf.forwarding.pipelines()
        wait_until(lambda: _behind(leaf.spool, pipeline.sink_name) == 0)

    return one


def test_what_is_not_for_the_hub_leaves_no_hole_there(
    leaf: Leaf, hub: HubServer, passing_over: Callable[[], None]
) -> None:
    info = leaf.open()
    leaf.log(info, 0)
    for step in range(1, 4):
        wait_until(lambda step=step: hub.steps == [*range(step)])  # type: ignore[misc]
        passing_over()
        passing_over()
        leaf.log(info, step)
    wait_until(lambda: hub.steps == [0, 1, 2, 3])
    (pipeline,) = leaf.forwarding.pipelines()
    assert len(hub.arrived(leaf.origin(pipeline))) == 1


def test_a_dead_letter_is_taken_however_much_has_come_since(
    leaf: Leaf, hub: HubServer, passing_over: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "RETRY_INTERVAL_S", 0.0)
    info = leaf.open()
    leaf.log(info, 0)
    wait_until(lambda: hub.steps == [0])
    hub.answers = [grpc.StatusCode.INVALID_ARGUMENT]
    leaf.log(info, 1)
    (pipeline,) = leaf.forwarding.pipelines()
    wait_until(lambda: pipeline.dead_letters()[0] == 1)
    for step in range(2, 70):
        passing_over()
        leaf.log(info, step)
    wait_until(lambda: hub.steps == [0, *range(2, 70)])
    (letter,) = found(leaf.letters)
    mark(letter)
    wait_until(lambda: pipeline.dead_letters()[0] == 0)
    wait_until(lambda: sorted(hub.steps) == [*range(70)])


def test_what_was_taken_unanswered_after_such_is_taken_once_from_the_next_agent(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    leaf = Leaf(open_spool(), tmp_path, hub)
    leaf.forwarding.start()
    info = leaf.open()
    (pipeline,) = leaf.forwarding.pipelines()
    leaf.spool.open_producer(producer(7), {}).result()
    leaf.log(producer(7), 0)
    wait_until(lambda: _behind(leaf.spool, pipeline.sink_name) == 0)
    hub.takes_unanswered, hub.answers = True, [grpc.StatusCode.INTERNAL] * 1000
    leaf.log(info, 1)
    wait_until(lambda: hub.steps == [1])
    ((first, last),) = hub.arrived(leaf.origin(pipeline))
    assert first < last
    leaf.close()
    leaf.spool.close()
    hub.answers.clear()
    again = Leaf(open_spool(), tmp_path, hub)
    again.forwarding.start()
    again.log(info, 2)
    wait_until(lambda: len(hub.steps) >= 2)
    again.close()
    assert hub.steps == [1, 2]


def test_an_agent_that_comes_later_forwards_what_is_left(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    spool = open_spool()
    first = Leaf(spool, tmp_path, hub)
    first.forwarding.start()
    hub.stop()
    first.log(first.open(), 1, 2)
    first.close()
    spool.close()
    hub.start()
    again = Leaf(open_spool(), tmp_path, hub)
    again.forwarding.start()
    wait_until(lambda: hub.steps == [1, 2])
    again.close()


def test_the_hub_of_a_run_stores_it_here_and_lets_others_in(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    noted: list[tuple[str, str]] = []

    class Guests:
        def note(self, run_id: str, token: str) -> None:
            noted.append((run_id, token))

    leaf = Leaf(open_spool(), tmp_path, hub, pin=PIN, guests=Guests())
    leaf.forwarding.start()
    assert leaf.open().hub == ""
    assert noted == [(RUN_ID, TOKEN)]
    assert leaf.forwarding.pipelines() == []
    leaf.close()


def test_where_all_goes_to_one_hub_rank_0_names_none(
    open_spool: OpenSpool, tmp_path: Path, hub: HubServer
) -> None:
    leaf = Leaf(open_spool(), tmp_path, hub, elsewhere=True)
    leaf.forwarding.start()
    assert leaf.open().hub == ""
    assert not leaf.reached.is_set()
    leaf.close()
