"""How ranks agree on rank 0's run and attempt: the rules, with a store in memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.client.jobs import HUB, OTHER_HUB, A, B, Clock, Job, MemoryLink, MemoryStore, Names, runs
from tests.fakes import DEADLINE_S, in_a_forked_process, wait_until
from trackagent.client.broadcast import GRACE_S, Word
from trackagent.client.errors import IdentityError
from trackagent.client.history import History, run_is_inherited
from trackagent.client.identity import SPARE_CONNECT_S, Identity


@pytest.fixture
def job() -> Iterator[Job]:
    job = Job(MemoryLink(MemoryStore()))
    yield job
    job.kill()


# Rank 0's word


def test_all_ranks_agree(job: Job) -> None:
    job.world_size = 4
    assert len(runs(job.all_ranks())) == 1


def test_the_others_hear_of_rank_0s_hub(job: Job) -> None:
    job.rank(0, hubs=Names(HUB))
    assert job.rank(1, hubs=Names(OTHER_HUB)).identity.hub == HUB


def test_what_keeps_rank_0_from_naming_a_hub_is_told_there(job: Job) -> None:
    names = Names(problem="there is none")
    assert [job.rank(rank, hubs=names).warnings for rank in (0, 1)] == [("there is none",), ()]


def test_ranks_that_cannot_hear_of_a_hub_are_told_once() -> None:
    job, names = Job(None), Names(HUB, cannot_hear="start every agent with --store")
    decisions = [job.rank(rank, run_id=A, hubs=names) for rank in (0, 1)]
    assert [decision.warnings for decision in decisions] == [
        ("start every agent with --store",),
        (),
    ]
    assert [decision.identity.hub for decision in decisions] == [None, None]


def test_a_rank_that_goes_on_without_rank_0_is_told_that_it_has_no_hub() -> None:
    clock = Clock()
    job = Job(MemoryLink(None, standing=False))
    names = Names(cannot_hear="call init() later")
    other = job.rank(1, run_id=A, hubs=names, clock=clock, sleep=clock.sleep)
    assert other.warnings == ("call init() later",)


def test_a_process_that_a_rank_forks_and_that_shares_its_run_shares_its_hub(job: Job) -> None:
    history = History()
    job.rank(0, run_id=A, history=history)
    for given, hub in ((A, HUB), (None, None)):
        child = in_a_forked_process(
            lambda given=given: job.rank(0, run_id=given, history=history, hubs=Names(HUB)).identity
        )
        assert child.hub == hub


def test_a_restarted_rank_0_on_another_node_names_another_hub(job: Job) -> None:
    for attempt, hub in ((1, HUB), (2, None), (3, OTHER_HUB)):
        job.rank(0, hubs=Names(hub))
        other = job.rank(1).identity
        assert (other.attempt, other.hub) == (attempt, hub)
        job.kill()


def test_a_rank_keeps_its_own_rank(job: Job) -> None:
    job.rank(0)
    assert job.rank(1).identity.rank == 1


def test_a_restarted_group_goes_on_with_the_run_as_its_next_attempt(job: Job) -> None:
    [(run_id, first)] = runs(job.all_ranks())
    job.kill()
    assert (first, runs(job.all_ranks())) == (1, {(run_id, 2)})


def test_a_group_that_dies_before_the_others_asked_misleads_nobody(job: Job) -> None:
    run_id = job.rank(0).identity.run_id
    job.kill()
    assert runs(job.all_ranks()) == {(run_id, 2)}


def test_a_rank_never_believes_a_dead_rank_0(job: Job) -> None:
    job.all_ranks()
    job.kill()
    with pytest.raises(IdentityError):
        job.rank(1, timeout_s=0.2)


def test_the_ask_of_a_dead_rank_is_answered_harmlessly(job: Job) -> None:
    with pytest.raises(IdentityError):
        job.rank(1, timeout_s=0.01)
    assert len(runs(job.all_ranks())) == 1


def test_the_kth_call_of_every_rank_is_the_same_run(job: Job) -> None:
    histories = [History(), History()]
    firsts = [job.rank(rank, history=histories[rank]) for rank in (0, 1)]
    seconds = [job.rank(rank, history=histories[rank]) for rank in (0, 1)]
    assert [len(runs(firsts)), len(runs(seconds)), len(runs(firsts + seconds))] == [1, 1, 2]


def test_the_second_run_of_a_job_is_at_its_first_attempt(job: Job) -> None:
    history = History()
    job.rank(0, history=history)
    assert job.rank(0, history=history).identity.attempt == 1


def test_a_late_rank_meets_the_call_it_belongs_to(job: Job) -> None:
    history = History()
    first = job.rank(0, history=history)
    job.rank(0, history=history)
    assert runs([job.rank(1)]) == runs([first])


def test_a_call_that_failed_does_not_count(job: Job) -> None:
    history = History()
    with pytest.raises(IdentityError):
        job.rank(1, history=history, timeout_s=0.01)
    first = job.rank(0)
    assert runs([job.rank(1, history=history)]) == runs([first])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_a_rank_forks_has_a_run_of_its_own(job: Job, rank: int) -> None:
    histories = [History(), History()]
    firsts = [job.rank(rank, history=histories[rank]) for rank in (0, 1)]
    child = in_a_forked_process(
        # Nobody would answer it.
        lambda: job.rank(rank, history=histories[rank], timeout_s=0.01).identity
    )
    assert (child.rank, child.world_size, child.attempt) == (0, 1, 1)
    assert child.run_id != firsts[0].identity.run_id


def test_a_process_that_a_rank_forks_may_share_its_run_by_id(job: Job) -> None:
    histories = [History(), History()]
    first = [job.rank(rank, run_id=A, history=histories[rank]) for rank in (0, 1)][1].identity

    def again() -> Identity:
        run_is_inherited(A, histories[1])
        return job.rank(1, run_id=A, history=histories[1], timeout_s=0.01).identity

    child = in_a_forked_process(again)
    assert (child.run_id, child.attempt, child.rank) == (A, first.attempt, 1)


def test_what_torchrun_counts_on_a_node_is_not_the_attempt(job: Job) -> None:
    counts = {0: "1", 1: "3"}
    told = [
        job.rank(rank, environ={"TORCHELASTIC_RESTART_COUNT": count}).identity.attempt
        for rank, count in counts.items()
    ]
    assert told == [1, 1]


def test_restarts_count_from_the_given_attempt(job: Job) -> None:
    environ = {"TRACKAGENT_ATTEMPT": "5"}
    job.all_ranks(environ=environ)
    job.kill()
    assert {attempt for _, attempt in runs(job.all_ranks(environ=environ))} == {6}


# Given ids where there is a store


def test_an_id_given_on_every_rank_is_taken(job: Job) -> None:
    assert runs(job.all_ranks(run_id=A)) == {(A, 1)}


def test_an_id_given_on_every_rank_has_its_attempts_counted(job: Job) -> None:
    job.all_ranks(run_id=A)
    job.kill()
    assert runs(job.all_ranks(run_id=A)) == {(A, 2)}


def test_an_id_given_on_rank_0_reaches_all(job: Job) -> None:
    job.rank(0, run_id=A)
    assert job.rank(1).identity.run_id == A


@pytest.mark.parametrize("rank_0_says", [A, None])
def test_another_id_on_another_rank_is_ignored(job: Job, rank_0_says: str | None) -> None:
    first = job.rank(0, run_id=rank_0_says)
    assert runs([job.rank(1, run_id=B)]) == runs([first])


def test_an_ignored_id_is_told(job: Job) -> None:
    job.rank(0, run_id=A)
    [warning] = job.rank(1, environ={"TRACKAGENT_RUN_ID": B}).warnings
    assert (
        warning == f"run id {B} from TRACKAGENT_RUN_ID is ignored on rank 1: rank 0 decided on {A}"
    )


def test_the_same_id_everywhere_is_no_reason_to_warn(job: Job) -> None:
    assert [decision.warnings for decision in job.all_ranks(run_id=A)] == [(), ()]


# A store that opens with the process group only


def test_rank_0_does_not_wait_for_a_store_that_it_opens_later() -> None:
    job = Job(MemoryLink(None, standing=False))
    assert job.rank(0, sleep=pytest.fail).identity.attempt == 1
    job.kill()


def test_the_others_hear_rank_0_once_the_store_opens() -> None:
    link = MemoryLink(None, standing=False)
    job = Job(link)
    first = job.rank(0)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(job.rank, 1)
        link.store = MemoryStore()
        assert runs([other.result(DEADLINE_S)]) == runs([first])
    job.kill()


def test_an_id_known_to_another_rank_needs_no_store() -> None:
    clock = Clock()
    job = Job(MemoryLink(None, standing=False))
    other = job.rank(1, run_id=A, clock=clock, sleep=clock.sleep)
    assert (runs([other]), round(clock.now, 6)) == ({(A, 1)}, SPARE_CONNECT_S)


def test_an_attempt_made_before_the_store_opened_is_counted() -> None:
    link = MemoryLink(None, standing=False)
    job, history = Job(link), History()
    job.rank(0, run_id=A, history=history)
    link.store, link.standing = MemoryStore(), True
    assert job.rank(0, run_id=A, history=history).identity.attempt == 2
    job.kill()


# No store


def test_ranks_with_a_given_id_need_no_store() -> None:
    assert runs(Job(None).all_ranks(run_id=A)) == {(A, 1)}


def test_ranks_with_nothing_to_agree_by_are_told_why() -> None:
    with pytest.raises(IdentityError, match=r"rank 1 of 2 has no way .* there is no store"):
        Job(None).rank(1)


@pytest.mark.parametrize("remedy", ["torchrun", "init_process_group", "TRACKAGENT_RUN_ID"])
def test_ranks_with_nothing_to_agree_by_are_told_what_to_do(remedy: str) -> None:
    with pytest.raises(IdentityError, match=remedy):
        Job(None).rank(0)


def test_waiting_for_a_store_is_bounded() -> None:
    clock = Clock()
    with pytest.raises(IdentityError, match="rank 1 of 2 waited 60 s for the store"):
        Job(MemoryLink(None)).rank(1, timeout_s=60, clock=clock, sleep=clock.sleep)
    assert clock.now == pytest.approx(60)


def test_waiting_for_rank_0_is_bounded() -> None:
    clock = Clock()
    job = Job(MemoryLink(MemoryStore()))
    with pytest.raises(IdentityError, match="rank 1 of 2 waited 60 s for rank 0's word"):
        job.rank(1, timeout_s=60, clock=clock, sleep=clock.sleep)
    assert clock.now == pytest.approx(60)


def test_a_long_wait_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    job = Job(MemoryLink(MemoryStore()))
    with pytest.raises(IdentityError):
        job.rank(1, timeout_s=60, clock=clock, sleep=clock.sleep)
    assert [record.message for record in caplog.records] == [
        "waiting for client.init() on rank 0; giving up in 50 s"
    ]


def test_a_single_process_does_without_its_torchruns_store() -> None:
    clock = Clock()
    decision = Job(MemoryLink(None), world_size=1).rank(
        0, timeout_s=60, clock=clock, sleep=clock.sleep
    )
    assert (decision.identity.attempt, len(decision.warnings)) == (1, 1)


def test_a_store_that_breaks_is_an_identity_error() -> None:
    store = MemoryStore()
    store.broken = True
    with pytest.raises(IdentityError, match=r"rank 1 of 2 lost the store .* connection was closed"):
        Job(MemoryLink(store)).rank(1)


def test_a_word_of_another_version_is_an_identity_error() -> None:
    store = MemoryStore()
    store.set("trackagent/1/word", '{"run": 1}')
    store.set("trackagent/1/answered", "1")
    with pytest.raises(IdentityError, match=r"rank 0's word .* is not understood .*'run_id'"):
        Job(MemoryLink(store)).rank(1)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda said: said[:-1], id="cut off"),
        pytest.param(lambda said: said + "\udcff", id="no UTF-8"),
        pytest.param(lambda said: said.replace("node-0:", "node-0 "), id="address"),
        pytest.param(lambda said: said.replace(HUB.token, HUB.token * 2), id="token"),
    ],
)
def test_a_word_that_is_not_understood_does_not_tell_the_token(
    damage: Callable[[str], str],
) -> None:
    store = MemoryStore()
    said = damage(Word(A, 1, HUB, B, 7).encode())
    store.data["trackagent/1/word"] = said.encode(errors="surrogateescape")
    store.set("trackagent/1/answered", "1")
    with pytest.raises(IdentityError, match="is not understood") as caught:
        Job(MemoryLink(store)).rank(1)
    assert HUB.token not in str(caught.value)


# Rank 0's thread


def serving() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "trackagent-identity"]


def test_serving_ends_when_every_rank_has_its_answer(job: Job) -> None:
    job.all_ranks()
    wait_until(lambda: serving() == [])


def test_serving_ends_with_the_run(job: Job) -> None:
    job.rank(0).stop_serving(wait_s=0)
    assert serving() == []


def test_stopping_twice_is_harmless(job: Job) -> None:
    decision = job.rank(0)
    decision.stop_serving(wait_s=0)
    decision.stop_serving(wait_s=0)
    assert serving() == []


def test_stopping_waits_for_a_rank_that_comes_late(job: Job) -> None:
    first = job.rank(0)
    stopping = threading.Thread(target=first.stop_serving, args=(DEADLINE_S,))
    stopping.start()
    assert runs([job.rank(1)]) == runs([first])
    stopping.join(DEADLINE_S)
    assert not stopping.is_alive()


def test_stopping_waits_no_longer_than_it_is_told(job: Job) -> None:
    first = job.rank(0)
    begin = time.monotonic()
    first.stop_serving(wait_s=0.05)
    assert 0.05 <= time.monotonic() - begin < DEADLINE_S


def test_a_long_run_ends_at_once_though_a_rank_never_came(job: Job) -> None:
    clock = Clock()
    first = job.rank(0, clock=clock)
    clock.now = GRACE_S + 1
    begin = time.monotonic()
    first.stop_serving(wait_s=10 * DEADLINE_S)
    assert time.monotonic() - begin < DEADLINE_S


def test_serving_ends_when_the_store_breaks(job: Job) -> None:
    job.rank(0)
    assert job.link is not None
    assert job.link.store is not None
    job.link.store.broken = True
    wait_until(lambda: serving() == [])


def test_a_store_that_went_with_its_process_group_is_not_used(job: Job) -> None:
    job.rank(0)
    assert job.link is not None
    job.link.gone = True
    wait_until(lambda: serving() == [])


def test_a_single_process_serves_nobody() -> None:
    Job(MemoryLink(MemoryStore()), world_size=1).rank(0)
    assert serving() == []


def test_a_forked_child_leaves_the_thread_to_its_parent(job: Job) -> None:
    decision = job.rank(0)
    server: Any = decision._server
    # As if the thread had been waking up: whoever touches its lock in the child waits for ever.
    with server._wake._cond:
        child = os.fork()
        if child == 0:
            signal.alarm(5)
            decision.stop_serving()
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


# Imports


def imported(program: str, *modules: str, **environ: str) -> str:
    line = f"import sys; {program}; print([m for m in {modules!r} if m in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", line],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return ended.stdout.strip()


def test_deciding_imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "grpc", "psutil")
    assert imported("import trackagent.client.identity", *heavy) == "[]"


def test_torch_is_not_imported_for_a_process_without_it() -> None:
    program = "from trackagent.client.torchlink import find_link; import os; find_link(os.environ)"
    environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert imported(program, "torch", **environ) == "[]"
