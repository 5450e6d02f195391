"""An agent that serves a group: its members log through it, each into runs of their own."""

from __future__ import annotations

import grp
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import grpc
import pytest

from tests.agent.samples import losses, producer
from tests.e2e.test_security import STEPS, train
from tests.fakes import (
    COMMAND,
    DEADLINE_S,
    AgentProcess,
    Folders,
    logged_records,
    short_folder,
    wait_until,
)
from tests.strangers import ALICE, BOB, being, command_as, give
from trackagent.agent.producers import to_message
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

CAROL = 60_003
GROUP = grp.getgrgid(1)  # daemon: every system has it, and nobody is in it
DATA = losses(range(4))
FLAGS = ("--group", GROUP.gr_name, "--deliver-interval-s", "0.02")

Stub = agent_pb2_grpc.AgentStub


def agent_of(uid: int, folders: Folders, *flags: str) -> AgentProcess:
    return AgentProcess(folders, *flags, command=(*command_as(uid, GROUP.gr_gid), str(COMMAND)))


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    """Alice's, which serves the group."""
    command_as(ALICE)  # skips where there are no other users
    base = give(short_folder(), ALICE, 0o711)
    process = agent_of(ALICE, Folders.under(base), *FLAGS)
    try:
        yield process.start()
    finally:
        process.close()
        shutil.rmtree(base)


@pytest.fixture
def folders() -> Iterator[Folders]:
    command_as(ALICE)
    base = give(short_folder(), ALICE, 0o711)
    yield Folders.under(base)
    shutil.rmtree(base)


@pytest.fixture
def bobs() -> Iterator[Folders]:
    base = give(short_folder(), BOB, 0o755)
    yield Folders.under(base)
    shutil.rmtree(base)


def train_as_bob(agent: AgentProcess, bobs: Folders, run_id: str) -> tuple[str, str]:
    """What Bob's training process prints, through Alice's agent; and what it warns of."""
    settings = {"TRACKAGENT_AGENT": agent.address, "TRACKAGENT_AGENT_USER": str(ALICE)}
    done = train(bobs, BOB, run_id, groups=(GROUP.gr_gid,), **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def call(
    agent: AgentProcess,
    uid: int,
    ask: Callable[[Stub], object],
    *,
    groups: tuple[int, ...] = (GROUP.gr_gid,),
    address: str = "",
) -> object:
    """What the agent answers a user, or the code with which it refuses."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with being(uid, *groups), grpc.insecure_channel(address or agent.address, options) as channel:
        try:
            return ask(Stub(channel))
        except grpc.RpcError as error:
            return error.code()


def opening(run_id: str, producer_id: bytes) -> Callable[[Stub], object]:
    message = to_message(producer(run_id=run_id, producer_id=producer_id))
    request = agent_pb2.OpenRunRequest(protocol_version=1, producer=message)
    return lambda stub: bool(stub.OpenRun(request, timeout=DEADLINE_S).agent_version)


def pushing(producer_id: bytes) -> Callable[[Stub], object]:
    request = agent_pb2.PushRequest(producer_id=producer_id, journal_bytes=DATA)
    return lambda stub: next(stub.Push(iter([request]), timeout=DEADLINE_S)).offset


def closing(producer_id: bytes) -> Callable[[Stub], object]:
    request = agent_pb2.CloseRunRequest(producer_id=producer_id)
    return lambda stub: stub.CloseRun(request, timeout=DEADLINE_S).complete


def status(stub: Stub) -> agent_pb2.StatusResponse:
    return stub.Status(agent_pb2.StatusRequest(), timeout=DEADLINE_S)


def node(stub: Stub) -> agent_pb2.NodeResponse:
    return stub.Node(agent_pb2.NodeRequest(), timeout=DEADLINE_S)


DENIED = grpc.StatusCode.PERMISSION_DENIED


# --- members


def test_a_member_logs_through_the_agent(agent: AgentProcess, bobs: Folders) -> None:
    run_id = uuid4().hex
    assert train_as_bob(agent, bobs, run_id) == ("True\n", "")
    agent.wait_for_status(run_id, "finished")
    assert [point.step for point in agent.exported(run_id)] == list(range(STEPS))


def test_members_meet_nobody_but_themselves(agent: AgentProcess) -> None:
    job, said = uuid4().hex, agent_pb2.MeetRequest.SET

    def meeting(**fields: Any) -> Callable[[Stub], object]:
        request = agent_pb2.MeetRequest(job=job, key="key", **fields)
        return lambda stub: stub.Meet(request, timeout=DEADLINE_S).value

    call(agent, BOB, meeting(operation=said, value=b"bob's"))
    assert [call(agent, uid, meeting()) for uid in (BOB, CAROL, ALICE)] == [b"bob's", b"", b""]


def test_who_is_no_member_cannot_connect(agent: AgentProcess) -> None:
    assert call(agent, CAROL, status, groups=()) == grpc.StatusCode.UNAVAILABLE


def test_the_group_may_enter_and_connect_and_no_more(agent: AgentProcess) -> None:
    folder, socket = agent.folders.directory.stat(), agent.folders.socket.stat()
    inner = (agent.folders.directory / "private").stat()
    assert [stat.S_IMODE(one.st_mode) for one in (folder, socket, inner)] == [0o710, 0o660, 0o700]
    assert [folder.st_gid, socket.st_gid] == [GROUP.gr_gid] * 2


def test_nothing_is_sent_to_an_agent_whose_user_is_not_named(
    agent: AgentProcess, bobs: Folders
) -> None:
    run_id = uuid4().hex
    done = train(bobs, BOB, run_id, groups=(GROUP.gr_gid,), TRACKAGENT_AGENT=agent.address)
    assert (done.stdout, f"belongs to user {ALICE}" in done.stderr) == ("False\n", True)
    assert "TRACKAGENT_AGENT_USER" in done.stderr


def test_a_folder_that_everyone_may_enter_stays_as_it_is(folders: Folders) -> None:
    folders.directory.mkdir()
    give(folders.directory, ALICE, 0o755)
    agent = agent_of(ALICE, folders, *FLAGS).start()
    try:
        answer = call(agent, BOB, opening(uuid4().hex, os.urandom(16)))
    finally:
        agent.close()
    found = folders.directory.stat()
    assert (answer, stat.S_IMODE(found.st_mode), found.st_gid) == (True, 0o755, ALICE)


# --- what is another user's


@pytest.fixture
def alices(agent: AgentProcess) -> tuple[str, bytes]:
    """A run of Alice's and its producer, with records."""
    run_id, producer_id = uuid4().hex, os.urandom(16)
    assert call(agent, ALICE, opening(run_id, producer_id)) is True
    assert call(agent, ALICE, pushing(producer_id)) == len(DATA)
    return run_id, producer_id


def test_another_users_run_cannot_be_opened(agent: AgentProcess, alices: tuple[str, bytes]) -> None:
    assert call(agent, BOB, opening(alices[0], os.urandom(16))) == DENIED


def test_another_users_producer_cannot_be_opened_for_a_run_of_ones_own(
    agent: AgentProcess, alices: tuple[str, bytes]
) -> None:
    assert call(agent, BOB, opening(uuid4().hex, alices[1])) == DENIED


@pytest.mark.parametrize("act", [pushing, closing])
def test_another_users_producer_cannot_be_written_or_ended(
    agent: AgentProcess,
    alices: tuple[str, bytes],
    act: Callable[[bytes], Callable[[Stub], object]],
) -> None:
    assert call(agent, BOB, act(alices[1])) == DENIED


def test_even_the_agents_user_opens_no_run_of_a_members(agent: AgentProcess) -> None:
    run_id = uuid4().hex
    assert call(agent, BOB, opening(run_id, os.urandom(16))) is True
    assert call(agent, ALICE, opening(run_id, os.urandom(16))) == DENIED


def test_a_member_sees_their_own_ranks_only(agent: AgentProcess, alices: tuple[str, bytes]) -> None:
    mine = os.urandom(16)
    assert call(agent, BOB, opening(uuid4().hex, mine)) is True
    answer = call(agent, BOB, status)
    assert isinstance(answer, agent_pb2.StatusResponse)
    seen = {one.producer.producer_id for one in answer.producers}
    assert (mine in seen, alices[1] in seen, answer.state_directory) == (True, False, "")


def test_a_member_sees_their_own_runs_only(agent: AgentProcess, alices: tuple[str, bytes]) -> None:
    mine = uuid4().hex
    assert call(agent, BOB, opening(mine, os.urandom(16))) is True
    seen = call(agent, BOB, node)
    assert isinstance(seen, agent_pb2.NodeResponse)
    runs = {run.run_id for run in seen.runs}
    assert (mine in runs, alices[0] in runs, seen.agent_version != "") == (True, False, True)
    everything = call(agent, ALICE, node)
    assert isinstance(everything, agent_pb2.NodeResponse)
    assert {mine, alices[0]} <= {run.run_id for run in everything.runs}


def test_the_agents_user_sees_all_ranks(agent: AgentProcess, alices: tuple[str, bytes]) -> None:
    bobs = os.urandom(16)
    assert call(agent, BOB, opening(uuid4().hex, bobs)) is True
    answer = call(agent, ALICE, status)
    assert isinstance(answer, agent_pb2.StatusResponse)
    assert {alices[1], bobs} <= {one.producer.producer_id for one in answer.producers}


def test_a_training_process_that_names_another_users_run_keeps_its_records(
    agent: AgentProcess, bobs: Folders, alices: tuple[str, bytes]
) -> None:
    said, warned = train_as_bob(agent, bobs, alices[0])
    assert (said, warned.count("another user's")) == ("False\n", 1)
    assert [one.step for one in logged_records(bobs)] == list(range(STEPS))


def test_the_services_own_socket_takes_nobody(agent: AgentProcess) -> None:
    address = f"unix:{agent.folders.directory}/private/s"
    ask = opening(uuid4().hex, os.urandom(16))
    assert call(agent, ALICE, ask, address=address) == DENIED
    assert call(agent, BOB, ask, address=address) == grpc.StatusCode.UNAVAILABLE


# --- what one member may take


def pushed_streams(agent: AgentProcess, uid: int, count: int) -> list[object]:
    """What a user is answered on each of `count` streams that are open at the same time."""
    ends: list[SimpleQueue[object]] = []
    answers: list[object] = []
    open_calls: list[object] = []  # one that nobody holds is cancelled

    def ask(stub: Stub) -> None:
        for _ in range(count):
            producer_id = os.urandom(16)
            opening(uuid4().hex, producer_id)(stub)
            ends.append(SimpleQueue())
            ends[-1].put(agent_pb2.PushRequest(producer_id=producer_id, journal_bytes=DATA))
            responses = stub.Push(iter(ends[-1].get, None), timeout=DEADLINE_S)
            open_calls.append(responses)
            try:
                answers.append(next(responses).offset)
            except grpc.RpcError as error:
                answers.append(error.code())
        for end in ends:
            end.put(None)

    call(agent, uid, ask)
    return answers


def test_a_member_takes_no_more_than_half_of_the_streams(folders: Folders) -> None:
    agent = agent_of(ALICE, folders, *FLAGS, "--max-streams", "4").start()
    try:
        bobs = pushed_streams(agent, BOB, 3)
        alices = pushed_streams(agent, ALICE, 3)
    finally:
        agent.close()
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (bobs, alices) == ([len(DATA), len(DATA), full], [len(DATA)] * 3)


# --- over restarts


def test_a_run_stays_its_users_over_a_kill_of_the_agent(folders: Folders) -> None:
    run_id, producer_id = uuid4().hex, os.urandom(16)
    agent = agent_of(ALICE, folders, *FLAGS).start()
    try:
        assert call(agent, BOB, opening(run_id, producer_id)) is True
        agent.kill()
        agent.start()
        answers = [
            call(agent, CAROL, opening(run_id, os.urandom(16))),
            call(agent, CAROL, pushing(producer_id)),
            call(agent, BOB, pushing(producer_id)),
        ]
    finally:
        agent.close()
    assert answers == [DENIED, DENIED, len(DATA)]


def test_what_was_logged_before_there_was_a_group_is_the_agents_users(folders: Folders) -> None:
    run_id, producer_id = uuid4().hex, os.urandom(16)
    alone = agent_of(ALICE, folders, "--deliver-interval-s", "0.02").start()
    try:
        assert call(alone, ALICE, opening(run_id, producer_id)) is True
        assert call(alone, ALICE, pushing(producer_id)) == len(DATA)
    finally:
        alone.stop()
    agent = agent_of(ALICE, folders, *FLAGS).start()
    try:
        answers = [
            call(agent, BOB, opening(run_id, os.urandom(16))),
            call(agent, BOB, pushing(producer_id)),
            call(agent, ALICE, pushing(producer_id)),
        ]
    finally:
        agent.close()
    assert answers == [DENIED, DENIED, len(DATA)]


def test_what_waits_in_the_spool_from_before_is_the_agents_users(folders: Folders) -> None:
    run_id, producer_id = uuid4().hex, os.urandom(16)
    slow = ("--deliver-interval-s", "3600", "--drain-timeout-s", "0")
    alone = agent_of(ALICE, folders, *slow).start()
    try:
        for ask in (opening(run_id, producer_id), pushing(producer_id), closing(producer_id)):
            call(alone, ALICE, ask)
    finally:
        alone.stop()
    agent = agent_of(ALICE, folders, "--group", GROUP.gr_name, *slow).start()
    try:
        answer = call(agent, BOB, opening(run_id, os.urandom(16)))
    finally:
        agent.close()
    assert answer == DENIED


def test_a_journal_that_the_dead_left_gives_no_entry_to_another_users_run(
    folders: Folders,
) -> None:
    run_id = uuid4().hex
    agent = agent_of(ALICE, folders, *FLAGS).start()
    try:
        assert call(agent, BOB, opening(run_id, os.urandom(16))) is True
        # With no agent at the other end, all of it stays in the journal.
        nobody = {"TRACKAGENT_AGENT": f"unix:{folders.directory.parent}/nobody"}
        train(folders, ALICE, run_id, **nobody)
        own = uuid4().hex
        train(folders, ALICE, own, **nobody)
        agent.wait_for_status(own, "finished")
        wait_until(lambda: "is another user's" in agent.output, "the journal is refused")
        wait_until(lambda: len(folders.journals()) == 1, "the other journal is done with")
    finally:
        agent.close()
    assert (len(folders.journals()), agent.run(run_id)) == (1, None)


def test_a_damaged_file_of_owners_lets_nobody_in(folders: Folders) -> None:
    run_id, producer_id = uuid4().hex, os.urandom(16)
    agent = agent_of(ALICE, folders, *FLAGS).start()
    try:
        call(agent, ALICE, opening(run_id, producer_id))
        agent.kill()
        for file in folders.state.glob("owners.db*"):
            file.write_bytes(b"damaged " * 1000)
        agent.start()
        answers = [
            call(agent, BOB, opening(run_id, os.urandom(16))),
            call(agent, BOB, pushing(producer_id)),
            call(agent, ALICE, pushing(producer_id)),
        ]
    finally:
        agent.close()
    assert answers == [DENIED, DENIED, len(DATA)]
    assert len(list((folders.state / "quarantine").glob("*-owners.db"))) == 1
